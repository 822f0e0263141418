"""The host: memory that plays HBM's part where there is no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import psutil

from tiered_mem.config import memory_to_spare
from tiered_mem.errors import DeviceError

if TYPE_CHECKING:
    import torch


class HostBackend:
    """Host memory: copies are done when the core returns, and nothing has to wait for them."""

    name = "cpu"
    in_place = True
    stream_ordered = False
    copy_back = True
    core = None

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def allocate(self, nbytes: int) -> torch.Tensor:
        raise DeviceError("on the host HBM is one mapping that the core makes, not in segments")

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        raise DeviceError("on the host slots are offsets in HBM's mapping, not addresses")

    def span(self, address: int) -> tuple[int, int]:
        raise DeviceError("on the host slots are offsets in HBM's mapping, not addresses")

    def wrap(self, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
        import torch

        # Memory outlives the mode: tensors made in inference mode couldn't be written to after it.
        with torch.inference_mode(False):
            return torch.from_numpy(memory)

    def write(self, address: int, block: npt.NDArray[np.uint8]) -> None:
        raise DeviceError("on the host slots are offsets in HBM's mapping, not addresses")

    def compute(self) -> int:
        return 0

    def memory(self) -> tuple[int, int]:
        return memory_to_spare(), psutil.virtual_memory().total


HOST = HostBackend()

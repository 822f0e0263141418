"""The CUDA backend over the double of its driver, with a torch that knows no CUDA.

For processes whose driver is the double (`driver_double.run_python`). Segments are the double's
device memory, which is host memory really: torch sees it as the CPU's. What would be queued on
torch's stream is done by the CPU at once, so `view` waits for that stream first, as work on it
would.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import torch
from driver_double import Double

from tiered_mem import _core
from tiered_mem.device.cuda import CudaBackend


class DoubleBackend(CudaBackend):
    """A `CudaBackend` without torch.cuda; without kernels."""

    def __init__(self, *, calibrate: bool = False) -> None:
        self.double = Double()
        super().__init__(torch.device("cuda:0"), calibrate=calibrate)
        self.device = torch.device("cpu")
        self._stream = self.double.make("cuStreamCreateWithPriority", 1, 0)

    def _start_torch(self) -> None:
        assert _core.cuda_device_count() > 0
        self.double.start()

    def _settle(self) -> None:
        self.core.wait(self.core.mark_compute(self._stream))

    def _load_kernels(self) -> bool:
        return False

    def _empty(self, nbytes: int) -> torch.Tensor:
        self.double.start()  # on this thread
        try:
            address, free = self.double.allocate(nbytes)
        except RuntimeError as error:
            raise torch.OutOfMemoryError(str(error)) from error
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(buffer, free).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        self.core.wait(self.core.mark_compute(self._stream))
        return super().view(address, nbytes)

    def _from_address(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        buffer.owner = owner  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def wrap(self, memory: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(memory)

    def compute(self) -> int:
        return self._stream

    def memory(self) -> tuple[int, int]:
        return self.core.memory()

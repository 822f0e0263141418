"""An NVIDIA GPU, driven through its driver's interface, in torch's own context and streams.

Copies run on streams of the core's; what torch computes waits for them on the device. HBM comes in
segments that torch allocates, so torch's statistics tell the truth. Where GPU and CPU share their
memory (Jetson, DGX Spark, Grace), HBM is host memory and blocks are read in place.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tiered_mem import _core
from tiered_mem.device import calibration, out_of_memory
from tiered_mem.device.segments import Segments, aligned, torch_memory
from tiered_mem.errors import DeviceError

logger = logging.getLogger(__name__)

# What HBM lets go is copied back to DRAM unless that slows copies in below this share of their
# speed: a block that isn't in DRAM has to come from NVMe again, at a fraction of the link's speed.
_DUPLEX_PAYS = 0.5


class CudaBackend:
    """A GPU. `calibrate` measures its ways to copy, unless that was done and kept.

    Raises `DeviceError` for a GPU that isn't there, and a driver that is missing or too old.
    """

    stream_ordered = True
    copy_back = True

    def __init__(self, device: torch.device, *, calibrate: bool | None = None) -> None:
        self.device = device
        self.name = str(device)
        self._segments = Segments()
        self._start_torch()
        self.core = _core.CudaDevice(device.index)
        self.in_place = self.core.integrated
        if self.in_place:
            logger.warning(
                "%s shares its memory with the CPU: HBM is host memory, and blocks are read in "
                "place, without copies and without a DRAM tier",
                self.name,
            )
        self._has_kernels = self._load_kernels()
        wanted = calibration.wanted() if calibrate is None else calibrate
        if wanted and not self.in_place:
            found = calibration.calibrate(
                self._identity(), self._measure, self.core.set_calibration
            )
            slowed = found["duplex_bytes_per_second"] / found["in_bytes_per_second"]
            self.copy_back = slowed >= _DUPLEX_PAYS

    def _start_torch(self) -> None:
        """Make torch's context, which the core then shares."""
        if torch.version.cuda is None:
            raise DeviceError(
                f"{self.name} can't be used: this torch is built without CUDA; install one with "
                "it, or use device='cpu'"
            )
        if _core.cuda_driver_version() is None:
            raise DeviceError(
                f"{self.name} can't be used: there is no NVIDIA driver (libcuda.so.1); install "
                "it, or use device='cpu'"
            )
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            count = torch.cuda.device_count()
            if self.device.index < count:
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:  # a driver too old for torch, a forked child, no GPU at all
            reason = str(error).splitlines()[0]
            if "fork" in reason:
                reason += "; start processes by multiprocessing's 'spawn'"
            raise DeviceError(f"{self.name} can't be used: {reason}") from error
        if self.device.index >= count:
            raise DeviceError(
                f"there is no {self.name}: torch sees {count} CUDA devices (CUDA_VISIBLE_DEVICES "
                "hides the others)"
            )

    def _load_kernels(self) -> bool:
        from tiered_mem.device import kernels

        try:
            kernels.load_kernels(self.core)
        except DeviceError as error:
            logger.warning(
                "%s copies by its copy engines alone, which are several times slower for blocks "
                "below about 100 KiB: %s",
                self.name,
                error,
            )
            return False
        return True

    @property
    def kernels(self) -> _core.CudaDevice | None:
        """What launches csrc/kernels.cu; None where they couldn't be loaded."""
        return self.core if self._has_kernels else None

    def _identity(self) -> dict[str, Any]:
        return {
            "name": self.core.name,
            "driver": self.core.driver_version,
            "pci_bus_id": self.core.pci_bus_id,
            "kernels": self._has_kernels,
        }

    def _measure(self) -> calibration.Calibration:
        logger.info("measuring the ways to copy to and from %s, once", self.name)
        measured: calibration.Calibration = self.core.calibrate()
        return measured

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            segment = aligned(self._empty, nbytes)
            # Its memory may have been used by what is still queued on torch's stream; copies into
            # it run on others.
            self._settle()
            return self._segments.add(segment)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.name, nbytes, self.memory(), error) from error

    def _settle(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        tensor = self._segments.view(address, nbytes)
        if tensor is not None:
            return tensor
        held = self._segments.hold(address, nbytes)
        if not held:
            raise DeviceError(f"{nbytes} bytes at {address:#x} aren't in a segment of {self.name}")
        return self._from_address(address, nbytes, held)

    def span(self, address: int) -> tuple[int, int]:
        return self._segments.span(address, neighbours=True)

    def wrap(self, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
        return self._from_address(memory.ctypes.data, memory.nbytes, memory)

    def _from_address(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        return torch.as_tensor(_Range(address, nbytes, owner), device=self.device)

    def write(self, address: int, block: npt.NDArray[np.uint8]) -> None:
        self.view(address, block.nbytes).copy_(torch.from_numpy(block))

    def compute(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def memory(self) -> tuple[int, int]:
        return torch_memory(self.device)


class _Range:
    """Device memory at an address, as torch takes it. Keeps its owner alive as long as a view."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }

"""Devices: where HBM's memory comes from, and what a caller's compute has to be told about it.

One `Backend` a device. `host` is host memory playing HBM's part; `cuda` drives an NVIDIA GPU
through its driver; `portable` serves every other accelerator that torch knows. torch is imported
only for what needs it.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from tiered_mem.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    import torch

    from tiered_mem import _core


@runtime_checkable
class Backend(Protocol):
    """What Python knows of a device. Safe to share between threads."""

    #: "cpu", "cuda:0", "xpu:0".
    name: str
    #: HBM is host memory (the host; memory that GPU and CPU share): one mapping, and slots are
    #: offsets in it. Otherwise HBM comes in segments, and slots are absolute device addresses.
    in_place: bool
    #: What is computed can be made to wait for copies; otherwise the host waits for them.
    stream_ordered: bool
    copy_back: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def core(self) -> _core.Device | None:
        """The device as the core knows it; None for the host."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return a segment: uint8, [nbytes], on the device, its address a multiple of 4096.

        It is known to `view` as long as the tensor itself (not only a view of it) lives. Raises
        `BudgetError` if the device has no such memory left.
        """

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        """Return memory of a segment, or of neighbouring ones, as uint8 [nbytes] without a copy.

        Raises `DeviceError` for memory that isn't in a segment.
        """

    def span(self, address: int) -> tuple[int, int]:
        """Return the bounds of the memory around a segment's address that one `view` may span."""

    def wrap(self, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return HBM's mapping as a tensor on the device, where HBM is host memory."""

    def write(self, address: int, block: npt.NDArray[np.uint8]) -> None:
        """Copy bytes into a segment, before what is computed on the current stream from now on."""

    def compute(self) -> int:
        """Return the `compute` argument for the core: the caller's current stream, as of now."""

    def memory(self) -> tuple[int, int]:
        """Return (bytes that could be taken now, bytes in all).

        What torch keeps for reuse counts as free, and a limit on this process as the device's size.
        """


#: What names a device, or is one.
DeviceLike: TypeAlias = "str | torch.device | Backend"

_backends: dict[str, tuple[int, Backend]] = {}
_lock = threading.Lock()


def backend_for(device: DeviceLike) -> Backend:
    """Return the backend of a device, one for each device of a process; one given, as it is.

    Raises `ConfigError` for what names no device, `DeviceError` for one that can't be used.
    """
    if isinstance(device, Backend):
        return device
    if str(device).partition(":")[0] == "cpu":
        from tiered_mem.device.host import HOST

        return HOST
    found = _parse(device)
    with _lock:
        made_by, backend = _backends.get(str(found), (os.getpid(), None))
        if made_by != os.getpid():
            raise DeviceError(
                f"{found} was in use before this process was forked, and a GPU doesn't survive "
                "that: start processes by multiprocessing's 'spawn', or use the model only in "
                "the process that loaded it"
            )
        if backend is None:
            backend = _make(found)
            _backends[str(found)] = (os.getpid(), backend)
        return backend


def _parse(device: str | torch.device) -> torch.device:
    """Return a device with its index."""
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{device!r} is no device: {reason}; write cpu or cuda:0") from error
    if ":" in str(found):
        return found
    return torch.device(found.type, _current_index(found.type))


def _current_index(kind: str) -> int:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    same = accelerator is not None and accelerator.type == kind
    return torch.accelerator.current_device_index() if same else 0


def _make(device: torch.device) -> Backend:
    import torch

    # ROCm presents itself as CUDA, but has no such driver.
    if device.type == "cuda" and torch.version.hip is None:
        from tiered_mem.device.cuda import CudaBackend

        return CudaBackend(device)
    from tiered_mem.device.portable import PortableBackend

    return PortableBackend.on_accelerator(device)


def out_of_memory(name: str, nbytes: int, memory: tuple[int, int], error: Exception) -> Any:
    """Return the `BudgetError` for a segment that couldn't be had."""
    from tiered_mem.config import format_size
    from tiered_mem.errors import BudgetError

    available, total = memory
    return BudgetError(
        f"{name} has no {format_size(nbytes)} left for HBM: {format_size(available)} of "
        f"{format_size(total)} are free, in pieces maybe; give a smaller hbm, or end what else "
        f"uses it ({str(error).splitlines()[0]})"
    )

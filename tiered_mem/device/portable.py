"""Any accelerator that torch knows (ROCm, XPU, Ascend, MUSA, ...), through `torch.accelerator`.

Slower than a driver's own interface, and complete. The core's I/O threads put their copies on a
queue (csrc/device_queue.h); a thread for each direction makes them on a side stream of its own.
Computing isn't made to wait for copies on the device: the host waits until they have arrived.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import torch

from tiered_mem import _core
from tiered_mem.config import format_size, memory_to_spare
from tiered_mem.device import out_of_memory
from tiered_mem.device.segments import Segments, aligned, torch_memory
from tiered_mem.errors import ConfigError, DeviceError

logger = logging.getLogger(__name__)

# Of page-locked memory that chunks are staged in on their way; each is at most 1 MiB.
_STAGING_NBYTES = 32 << 20
# Devices whose tensors have no address that bytes could be found at.
_WITHOUT_ADDRESSES = {"mps", "meta", "vulkan", "xla", "lazy"}


class Point(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None: ...


class Work(Protocol):
    """Streams and points of a device."""

    def side_stream(self) -> Any: ...
    def on(self, stream: Any) -> AbstractContextManager[object]: ...
    def point(self, stream: Any = None) -> Point:
        """Return the point behind what `stream` (the caller's current one) was given until now."""

    def hold(self, stream: Any, point: Any) -> None:
        """Let what `stream` is given from now on wait for a point."""

    def synchronize(self) -> None: ...
    def memory(self) -> tuple[int, int]: ...


class AcceleratorWork:
    """Streams of an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def side_stream(self) -> torch.Stream:
        return torch.Stream(device=self._device)

    def on(self, stream: torch.Stream) -> AbstractContextManager[object]:
        return stream  # it is one itself

    def point(self, stream: torch.Stream | None = None) -> torch.Event:
        event = torch.Event(device=self._device)
        event.record(stream or torch.accelerator.current_stream(self._device))
        return event

    def hold(self, stream: torch.Stream, point: torch.Event) -> None:
        stream.wait_event(point)

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self._device)

    def memory(self) -> tuple[int, int]:
        return torch_memory(self._device)


class HostWork:
    """A pretended accelerator in host memory: work is done when it is given. For tests."""

    class _Done:
        def synchronize(self) -> None: ...

    def side_stream(self) -> None: ...

    def on(self, stream: object) -> AbstractContextManager[object]:
        return nullcontext()

    def point(self, stream: object | None = None) -> Point:
        return self._Done()

    def hold(self, stream: object, point: Point) -> None: ...
    def synchronize(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        return memory_to_spare(), psutil.virtual_memory().total


class PortableBackend:
    """An accelerator by way of torch. The device "cpu" stands for a pretended one."""

    in_place = False
    stream_ordered = False
    copy_back = True

    def __init__(self, device: torch.device, work: Work) -> None:
        self.device = device
        self.name = str(device)
        self.core = _core.QueueDevice()
        self._segments = Segments()
        self._work = work
        self._ids = itertools.count(1)
        self._points: dict[int, Point] = {}
        self._pinned = self._pin()
        mover = Mover(self.core, work, self._segments, self._points, self._pinned)
        mover.start()
        # The threads know nothing of the backend: they end when nobody has it any more.
        weakref.finalize(self, self.core.close, f"{self.name} was given up").atexit = False

    @classmethod
    def on_accelerator(cls, device: torch.device) -> PortableBackend:
        """Raises `ConfigError` for what isn't torch's accelerator here, `DeviceError`."""
        if device.type in _WITHOUT_ADDRESSES:
            raise ConfigError(
                f"tiered-mem can't use {device.type}: its memory has no addresses; use cpu"
            )
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or accelerator.type != device.type:
            there = "none" if accelerator is None else accelerator.type
            raise DeviceError(
                f"{device} can't be used: torch's accelerator here is {there}; use cpu, or install "
                f"a torch for {device.type}"
            )
        if device.index >= torch.accelerator.device_count():
            raise DeviceError(
                f"there is no {device}: torch sees {torch.accelerator.device_count()} of them"
            )
        logger.warning(
            "%s is driven through torch's portable interface: the host waits for every copy, and "
            "DRAM isn't page-locked",
            device,
        )
        return cls(device, AcceleratorWork(device))

    def _pin(self) -> torch.Tensor | None:
        if self.device.type == "cpu":
            return None
        try:
            pinned = torch.empty(_STAGING_NBYTES, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning(
                "%s can't page-lock %s of host memory (%s): copies go through its driver's own "
                "buffers, one at a time",
                self.name,
                format_size(_STAGING_NBYTES),
                str(error).splitlines()[0],
            )
            return None
        self.core.add_pinned(pinned.data_ptr(), pinned.numel(), pinned)
        return pinned

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return self._segments.add(aligned(self._empty, nbytes))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError, and others' own
            raise out_of_memory(self.name, nbytes, self.memory(), error) from error

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        tensor = self._segments.view(address, nbytes)
        if tensor is None:
            raise DeviceError(
                f"{nbytes} bytes at {address:#x} aren't in one segment of {self.name}"
            )
        return tensor

    def span(self, address: int) -> tuple[int, int]:
        return self._segments.span(address, neighbours=False)

    def wrap(self, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
        raise DeviceError(f"{self.name} has its own memory: HBM isn't a mapping of the host's")

    def write(self, address: int, block: npt.NDArray[np.uint8]) -> None:
        self.view(address, block.nbytes).copy_(torch.from_numpy(block))

    def compute(self) -> int:
        for forgotten in self.core.take_forgotten():
            self._points.pop(forgotten, None)
        number = next(self._ids)
        self._points[number] = self._work.point()
        return number

    def memory(self) -> tuple[int, int]:
        return self._work.memory()


Command = tuple[int, list[tuple[int, int, int]], list[int]]


class Mover:
    """Makes the copies of a `QueueDevice` on side streams, in a thread for each direction."""

    def __init__(
        self,
        core: _core.QueueDevice,
        work: Work,
        segments: Segments,
        points: dict[int, Point],
        pinned: torch.Tensor | None,
    ) -> None:
        self._core = core
        self._work = work
        self._segments = segments
        self._points = points
        self._pinned = pinned

    def start(self) -> None:
        for name, take, copy in (
            ("in", self._core.take_in, self._copy_in),
            ("out", self._core.take_out, self._copy_out),
        ):
            thread = threading.Thread(
                target=self._serve, args=(take, copy), name=f"tiered-mem copies {name}", daemon=True
            )
            thread.start()

    def _serve(
        self,
        take: Callable[[], list[Command] | None],
        copy: Callable[[int, int, int], None],
    ) -> None:
        stream = self._work.side_stream()
        while (commands := take()) is not None:
            started = [(c[0], self._start(stream, c, copy)) for c in commands]
            for number, point in started:
                if point is not None:
                    self._finish(number, point)

    def _start(
        self, stream: object, command: Command, copy: Callable[[int, int, int], None]
    ) -> Point | None:
        number, copies, points = command
        try:
            for point in points:
                if point:
                    self._work.hold(stream, self._points[point])
                else:  # a block whose reader went without a word: behind all that is under way
                    self._work.synchronize()
            with self._work.on(stream):
                for target, source, nbytes in copies:
                    copy(target, source, nbytes)
            return self._work.point(stream)
        except Exception as error:
            with suppress(Exception):  # what was started must not come later than the bad news
                self._work.point(stream).synchronize()
            self._core.fail(number, f"a copy failed: {error}")
            return None

    def _finish(self, number: int, point: Point) -> None:
        try:
            point.synchronize()
        except Exception as error:
            self._core.fail(number, f"a copy failed: {error}")
        else:
            self._core.complete(number)

    def _copy_in(self, target: int, source: int, nbytes: int) -> None:
        self._on_device(target, nbytes).copy_(self._on_host(source, nbytes), non_blocking=True)

    def _copy_out(self, target: int, source: int, nbytes: int) -> None:
        self._on_host(target, nbytes).copy_(self._on_device(source, nbytes), non_blocking=True)

    def _on_device(self, address: int, nbytes: int) -> torch.Tensor:
        tensor = self._segments.view(address, nbytes)
        if tensor is None:
            raise DeviceError(f"{nbytes} bytes at {address:#x} aren't in a segment")
        return tensor

    def _on_host(self, address: int, nbytes: int) -> torch.Tensor:
        # torch knows its own page-locked memory best as its own tensor.
        if self._pinned is not None:
            first = address - self._pinned.data_ptr()
            if 0 <= first <= self._pinned.numel() - nbytes:
                return self._pinned[first : first + nbytes]
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.uint8)


def pretended() -> PortableBackend:
    """Return a portable backend whose device is host memory, with everything else as it is."""
    return PortableBackend(torch.device("cpu"), HostWork())

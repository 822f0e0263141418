"""A device's memory as torch hands it out: segments, found by address, and what is left."""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Callable

import torch

ALIGNMENT = 4096  # what the core asks of a segment's address and size


class Segments:
    """Tensors by the addresses of their memory. Keeps none of them alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tensors: weakref.WeakValueDictionary[int, torch.Tensor]
        self._tensors = weakref.WeakValueDictionary()
        self._addresses: list[int] = []

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self._tensors[tensor.data_ptr()] = tensor
            self._addresses = sorted(self._tensors.keys())
        return tensor

    def view(self, address: int, nbytes: int) -> torch.Tensor | None:
        """Return a slice of a segment; None if these bytes aren't inside one."""
        tensor = self._holding(address)
        if tensor is None:
            return None
        first = address - tensor.data_ptr()
        return tensor[first : first + nbytes] if first + nbytes <= tensor.numel() else None

    def hold(self, address: int, nbytes: int) -> list[torch.Tensor]:
        """Return the neighbouring segments that these bytes lie in; none if one is missing."""
        found = []
        end = address + nbytes
        while address < end:
            tensor = self._holding(address)
            if tensor is None:
                return []
            found.append(tensor)
            address = tensor.data_ptr() + tensor.numel()
        return found

    def span(self, address: int, *, neighbours: bool) -> tuple[int, int]:
        """Return the bounds of the segment around an address, and of its `neighbours` too."""
        tensor = self._holding(address)
        if tensor is None:
            return address, address
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel()
        while neighbours and (tensor := self._holding(end)) is not None:
            end = tensor.data_ptr() + tensor.numel()
        while neighbours and (tensor := self._holding(start - 1)) is not None:
            start = tensor.data_ptr()
        return start, end

    def _holding(self, address: int) -> torch.Tensor | None:
        addresses = self._addresses
        # A segment that is gone may stand before the one that holds the address.
        for i in range(bisect.bisect_right(addresses, address) - 1, -1, -1):
            tensor = self._tensors.get(addresses[i])
            if tensor is not None:
                return tensor if address < tensor.data_ptr() + tensor.numel() else None
        return None


def aligned(make: Callable[[int], torch.Tensor], nbytes: int) -> torch.Tensor:
    """Return `make(nbytes)`, or a page-aligned part of something larger if that isn't aligned.

    Allocators give large memory aligned to 2 MiB, but may cut a used piece of it anywhere.
    """
    tensor = make(nbytes)
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    del tensor
    tensor = make(nbytes + ALIGNMENT)
    skipped = -tensor.data_ptr() % ALIGNMENT
    return tensor[skipped : skipped + nbytes]


def torch_memory(device: torch.device) -> tuple[int, int]:
    """Return `Backend.memory` of a device whose memory torch allocates."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = (
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
        )
        # What torch.cuda.set_per_process_memory_fraction allows this process.
        total = int(total * torch.cuda.get_per_process_memory_fraction(device))
    else:
        free, total = torch.accelerator.get_memory_info(device)
        allocated = torch.accelerator.memory_allocated(device)
        reserved = torch.accelerator.memory_reserved(device)
    cached = reserved - allocated
    return max(0, min(free + cached, total - allocated)), total

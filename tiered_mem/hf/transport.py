"""Small things between the host and the device that computes: ids out, tables in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_BATCH = 64  # uses that share a device event
_MOST_BATCHES = 8  # of a thread that nobody has asked for; then it waits for the oldest


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies in host memory of tensors on one device, and wait for the device once."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    copies = [_pinned(tensor) for tensor in tensors]
    for i, (copy, tensor) in enumerate(zip(copies, tensors, strict=True)):
        copy.copy_(tensor, non_blocking=i + 1 < len(tensors))  # the last one waits for all
    return copies


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return a copy on the device, without waiting for it."""
    source = torch.from_numpy(array)
    if device.type == "cpu":
        return source
    # torch takes the pinned memory back once the copy is done.
    return _pinned(source).copy_(source).to(device, non_blocking=True)


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class _Use(NamedTuple):
    tell: Callable[[npt.NDArray[np.int64]], None]
    ids: torch.Tensor  # on the host, once the batch has arrived


class _Batch:
    """Ids that one stream copies out."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.accelerator.current_stream(device)
        self._arrived: torch.Event | None = None
        self.uses: list[_Use] = []

    def seal(self) -> None:
        if self._arrived is None:
            self._arrived = torch.Event(self._stream.device)
            self._arrived.record(self._stream)

    @property
    def sealed(self) -> bool:
        return self._arrived is not None

    def tell(self, wait: bool) -> bool:
        """Pass the ids on if they have arrived. Returns whether they have."""
        assert self._arrived is not None
        if wait:
            self._arrived.synchronize()
        elif not self._arrived.query():
            return False
        for use in self.uses:
            use.tell(use.ids.numpy().reshape(-1))
        return True


class LateUses:
    """Tells which experts were used where the host didn't have to know it: some events later.

    In the order of each thread's events. Safe to share between threads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._open: dict[int, _Batch] = {}  # by thread
        self._waiting: list[_Batch] = []

    def add(self, ids: torch.Tensor, tell: Callable[[npt.NDArray[np.int64]], None]) -> None:
        """Call `tell` with the ids, flat, once they are on the host: at a later call, or `drain`.

        Doesn't wait for the device, unless very many wait to be told.
        """
        if self._device.type == "cpu":
            tell(ids.numpy().reshape(-1))
            return
        copy = _pinned(ids).copy_(ids, non_blocking=True)
        thread = threading.get_ident()
        with self._lock:
            batch = self._open.get(thread)
            if batch is None:
                batch = self._open[thread] = _Batch(self._device)
            batch.uses.append(_Use(tell, copy))
            if len(batch.uses) >= _BATCH:
                batch.seal()
                self._waiting.append(self._open.pop(thread))
                self._tell(wait=len(self._waiting) > _MOST_BATCHES)

    def drain(self) -> None:
        """Tell of all that was added, and wait for what is still on its way."""
        with self._lock:
            for batch in self._open.values():
                batch.seal()
            self._waiting += self._open.values()
            self._open.clear()
            while self._waiting:
                self._tell(wait=True)

    def _tell(self, wait: bool) -> None:
        while self._waiting and self._waiting[0].tell(wait):
            del self._waiting[0]
            wait = False

"""DRAM is page-locked in the background, piece by piece, once it is filled.

Page-locking is slow (about a second a gigabyte) and only what is used needs it. Until a piece is
pinned, copies from it go through page-locked chunks on the I/O threads.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from tiered_mem.errors import DeviceError, RuntimeClosedError

if TYPE_CHECKING:
    from tiered_mem import _core

logger = logging.getLogger(__name__)

_PIECE_NBYTES = 64 << 20


class Pinning(threading.Thread):
    """Pins what DRAM has come to use, until it is told to stop or can't."""

    _EVERY_SECONDS = 1.0

    def __init__(self, tiers: _core.Tiers, device: str) -> None:
        super().__init__(name="tiered-mem pinning", daemon=True)
        self._tiers = weakref.ref(tiers)  # a runtime that nobody uses may go
        self._device = device
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(self._EVERY_SECONDS):
            try:
                while (tiers := self._tiers()) is not None and tiers.pin_dram(_PIECE_NBYTES):
                    if self._stopped.is_set():
                        return
            except RuntimeClosedError:
                return
            except DeviceError as error:
                logger.warning(
                    "DRAM can't be page-locked for %s (%s): copies from it go through a buffer, "
                    "which costs the CPU a copy of every byte; raise ulimit -l if that is why",
                    self._device,
                    error,
                )
                return
            if tiers is None:
                return
            del tiers

    def stop(self) -> None:
        self._stopped.set()

"""Budgets that follow the memory the machine has left."""

from __future__ import annotations

import logging
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from tiered_mem.config import format_size, memory_to_spare
from tiered_mem.errors import RuntimeClosedError

if TYPE_CHECKING:
    from tiered_mem.runtime import Runtime

logger = logging.getLogger(__name__)


class MemoryWatch(threading.Thread):
    """Shrinks `auto` budgets when the machine runs short of memory, DRAM before HBM."""

    _EVERY_SECONDS = 1.0

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(name="tiered-mem memory watch", daemon=True)
        self._runtime = weakref.ref(runtime)  # a runtime that nobody uses may go
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(self._EVERY_SECONDS):
            runtime = self._runtime()
            if runtime is None:
                return
            with suppress(RuntimeClosedError):
                shrink_to_fit(runtime, memory_to_spare())
            del runtime

    def stop(self) -> None:
        self._stopped.set()


def shrink_to_fit(runtime: Runtime, spare: int) -> None:
    """Shrink the `auto` budgets of `runtime` if they promise more than the machine has to give.

    `spare` is what could still be taken now. What the tiers use already is theirs; what they may
    yet take must not exceed `spare`.
    """
    budgets, used = runtime.budgets, runtime.nbytes_used()
    excess = (budgets.hbm - used["hbm"]) + (budgets.dram - used["dram"]) - spare
    if excess <= 0:
        return
    if budgets.auto_dram and budgets.dram:
        smaller = max(0, budgets.dram - excess)
        logger.warning("memory is short: DRAM shrinks to %s", format_size(smaller))
        runtime.resize(dram=smaller)
        excess -= budgets.dram - smaller
    if budgets.auto_hbm and excess > 0:
        least = max(budgets.hbm // 16, runtime.largest_block())
        smaller = min(budgets.hbm, max(least, budgets.hbm - excess))
        logger.warning("memory is short: HBM's part shrinks to %s", format_size(smaller))
        runtime.resize(hbm=smaller)

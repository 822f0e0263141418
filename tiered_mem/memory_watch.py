"""Budgets that follow the memory the machine has left."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from tiered_mem.config import format_size, headroom
from tiered_mem.errors import BudgetError, RuntimeClosedError

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
            try:
                shrink_to_fit(runtime, headroom())
            except (RuntimeClosedError, BudgetError):
                pass  # closed, or a model with larger blocks came meanwhile: look again
            except Exception:
                logger.exception("the memory watch failed; it goes on")
            del runtime

    def stop(self) -> None:
        self._stopped.set()


def shrink_to_fit(runtime: Runtime, headroom: int) -> None:
    """Shrink the `auto` budgets of `runtime` if they promise more than the machine has to give.

    `headroom` is what could still be taken now, negative if too much is taken already. What the
    tiers may yet take must not exceed it; if it is negative, they give back what they have.
    """
    budgets, used = runtime.budgets, runtime.nbytes_used()
    excess = (budgets.hbm - used["hbm"]) + (budgets.dram - used["dram"]) - headroom
    if excess <= 0:
        return
    if budgets.auto_dram and budgets.dram:
        smaller = max(0, budgets.dram - excess)
        logger.warning("memory is short: DRAM shrinks to %s", format_size(smaller))
        runtime.resize(dram=smaller)
        excess -= budgets.dram - smaller
    if budgets.auto_hbm and excess > 0:
        smaller = max(runtime.least_hbm(), budgets.hbm - excess)
        if smaller < budgets.hbm:
            logger.warning("memory is short: HBM's part shrinks to %s", format_size(smaller))
            runtime.resize(hbm=smaller)

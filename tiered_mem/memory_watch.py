"""Budgets that follow the memory that machine and device have left."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING

from tiered_mem.config import DeviceMemory, format_size, headroom
from tiered_mem.errors import BudgetError, RuntimeClosedError

if TYPE_CHECKING:
    from tiered_mem.runtime import Runtime

logger = logging.getLogger(__name__)


class MemoryWatch(threading.Thread):
    """Shrinks `auto` budgets when machine or device run short of memory, DRAM before HBM."""

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
                device = DeviceMemory.of(runtime.backend) if runtime.budgets.auto_hbm else None
                shrink_to_fit(runtime, headroom())
                if device is not None:
                    shrink_device(runtime, device)
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
    tiers may yet take must not exceed it; if it is negative, they give back what they have. HBM
    counts only where it is host memory.
    """
    budgets, used = runtime.budgets, runtime.nbytes_used()
    in_place = runtime.backend.in_place
    excess = (budgets.dram - used["dram"]) - headroom
    if in_place:
        excess += budgets.hbm - used["hbm"]
    if excess <= 0:
        return
    if budgets.auto_dram and budgets.dram:
        smaller = max(0, budgets.dram - excess)
        logger.warning("memory is short: DRAM shrinks to %s", format_size(smaller))
        runtime.resize(dram=smaller)
        excess -= budgets.dram - smaller
    if budgets.auto_hbm and in_place and excess > 0:
        _shrink_hbm(runtime, excess, "memory")


def shrink_device(runtime: Runtime, memory: DeviceMemory) -> None:
    """Shrink an `auto` HBM if the device runs short: its room is there to be used, but not up."""
    if memory.headroom() < -memory.room // 2:
        _shrink_hbm(runtime, -memory.headroom(), f"memory of {memory.name}")


def _shrink_hbm(runtime: Runtime, excess: int, what: str) -> None:
    now = runtime.budgets.hbm
    smaller = max(runtime.least_hbm(), now - excess)
    if smaller < now:
        logger.warning("%s is short: HBM's part shrinks to %s", what, format_size(smaller))
        runtime.resize(hbm=smaller)

"""The runtime: Python plans, C++ executes.

A `Runtime` is the HBM and DRAM tiers; each model on it has a `Space` of blocks that come from a
store. One call per event crosses into C++ (`Space.begin`); from then on the I/O threads move bytes
while Python computes on the blocks in the order they arrive.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import psutil

from tiered_mem import _core
from tiered_mem.config import Budgets, format_size
from tiered_mem.device import Backend, DeviceLike, backend_for
from tiered_mem.device.hbm import Hbm
from tiered_mem.device.pinning import Pinning
from tiered_mem.errors import BudgetError, ConfigError, TieredMemError
from tiered_mem.kv_space import KvSpace
from tiered_mem.memory_watch import MemoryWatch
from tiered_mem.policy import DEFAULT_EVICTION, EvictionPolicy, resolve_eviction
from tiered_mem.space import Repair, Space
from tiered_mem.stats import Log, Stats
from tiered_mem.store import Store

logger = logging.getLogger(__name__)

_AnySpace = TypeVar("_AnySpace", Space, KvSpace)
_MAX_SPACES = 256
_LEAST_SHARE = 16  # of the HBM it started with, a runtime keeps one part in so many


class Runtime:
    """HBM and DRAM of `hbm` and `dram` bytes, shared by any number of models and threads.

    HBM is memory of `device`; on "cpu" host memory plays its part. A GPU's is taken when the first
    model comes, cut to the size of its blocks. `eviction` names a policy (`tiered-mem policies`
    lists them) or is a class derived from `tiered_mem.policy.EvictionPolicy`.

    Raises `ConfigError` for an unknown one, `PolicyError` for a plug-in that can't be had,
    `BudgetError` for budgets that can't, `DeviceError` for a device that can't be used.
    """

    def __init__(
        self,
        hbm: int,
        dram: int = 0,
        *,
        device: DeviceLike = "cpu",
        eviction: str | type[EvictionPolicy] = DEFAULT_EVICTION,
        num_io_threads: int = 4,
    ) -> None:
        if num_io_threads < 1:
            raise ConfigError(f"num_io_threads is {num_io_threads}; it must be at least 1")
        backend = backend_for(device)
        budgets = Budgets.for_backend(hbm, dram, whole=0, backend=backend)
        self._start(budgets, eviction, num_io_threads, backend)

    @classmethod
    def from_budgets(
        cls,
        budgets: Budgets,
        *,
        eviction: str | type[EvictionPolicy],
        num_io_threads: int = 4,
        device: DeviceLike = "cpu",
    ) -> Runtime:
        """Make a runtime whose `auto` budgets follow the memory that machine and device have left.

        Raises as a runtime of given sizes does.
        """
        runtime = cls.__new__(cls)
        runtime._start(budgets, eviction, num_io_threads, backend_for(device))
        return runtime

    def _start(
        self,
        budgets: Budgets,
        eviction: str | type[EvictionPolicy],
        num_io_threads: int,
        backend: Backend,
    ) -> None:
        self.backend = backend
        self.eviction = resolve_eviction(eviction)
        self._budgets = self._budgets_at_start = budgets
        # Re-entrant: the garbage collector may close a model in the middle of anything.
        self._lock = threading.RLock()
        self._spaces: dict[int, Space | KvSpace] = {}
        self._tiers = _make_tiers(budgets, self.eviction, num_io_threads, backend)
        self._hbm = None if backend.in_place else Hbm(backend, self._tiers)
        self._watch = MemoryWatch(self) if budgets.auto_hbm or budgets.auto_dram else None
        pins = not backend.in_place and budgets.dram > 0
        self._pinning = Pinning(self._tiers, backend.name) if pins else None

    @property
    def budgets(self) -> Budgets:
        return self._budgets

    @property
    def closed(self) -> bool:
        return bool(self._tiers.closed)

    def attach(self, store: Store, *, repair: Repair | None = None) -> Space:
        """Put a store's blocks on the runtime. `repair` supplies a block that fails its checksum.

        The store stays open as long as the space is. Raises `BudgetError` if the device has too
        little memory left for HBM, or if HBM can't hold one of the blocks.
        """
        return self._attach(lambda number: Space(self, number, store, repair))

    def attach_kv(self, store: Store) -> KvSpace:
        """Make room for a model's KV blocks; there are none yet.

        `store` is open for writing, and stays so as long as the space is open. Raises as `attach`.
        """
        return self._attach(lambda number: KvSpace(self, number, store))

    def _attach(self, make: Callable[[int], _AnySpace]) -> _AnySpace:
        with self._lock:
            number = next((n for n in range(_MAX_SPACES) if n not in self._spaces), None)
            if number is None:
                raise ConfigError(f"a runtime holds at most {_MAX_SPACES} models; close one first")
            space = make(number)
            self._spaces[number] = space
            try:
                self._provide_hbm(space.largest_slot)
            except BaseException:
                space.close()
                raise
        return space

    def _provide_hbm(self, slot_nbytes: int) -> None:
        """Take a device's memory for HBM, unless that is done. Only now is its use known."""
        if self._hbm is None or slot_nbytes == 0:
            return
        auto = self._budgets.auto_hbm
        nbytes = self._hbm.provide(self._budgets.hbm, slot_nbytes, or_less=auto)
        if auto and nbytes < self._budgets.hbm:
            self._budgets = replace(self._budgets, hbm=nbytes)

    def resize(self, *, hbm: int | None = None, dram: int | None = None) -> None:
        """Change budgets, in bytes. A shrink that pins hold up goes on as they end.

        A device's memory is taken and given back in segments, about a sixteenth of HBM each.

        Raises `BudgetError` as for a new runtime, or if HBM couldn't hold a single block of a model
        on it, or if address space for growth couldn't be reserved; `RuntimeClosedError`.
        """
        with self._lock:
            before = self._budgets
            wanted = Budgets.for_backend(
                before.hbm if hbm is None else hbm,
                before.dram if dram is None else dram,
                whole=0,
                backend=self.backend,
            )
            least = self.largest_block()
            if wanted.hbm < least:
                raise BudgetError(
                    f"hbm is {format_size(wanted.hbm)}, but a block of a model on this runtime has "
                    f"{format_size(least)} ({least} bytes); give at least that"
                )
            if hbm is not None:
                if self._hbm is None:
                    self._tiers.resize_hbm(wanted.hbm)
                else:
                    self._hbm.resize(wanted.hbm, least)
                self._budgets = replace(self._budgets, hbm=wanted.hbm)
            if dram is not None:
                self._tiers.resize_dram(wanted.dram)
                self._budgets = replace(self._budgets, dram=wanted.dram)

    def largest_block(self) -> int:
        """Return the bytes of the largest slot that a model on the runtime needs; 0 without any."""
        with self._lock:
            return max((space.largest_slot for space in self._spaces.values()), default=0)

    def least_hbm(self) -> int:
        """Return the bytes below which HBM doesn't shrink by itself, however short memory is."""
        return max(self._budgets_at_start.hbm // _LEAST_SHARE, self.largest_block())

    def stats(self) -> Stats:
        """Return the counts since the start."""
        counted: dict[str, Any] = self._tiers.stats()
        return Stats(**{f.name: counted[f.name] for f in fields(Stats)})

    def nbytes_used(self) -> dict[str, int]:
        """Return the bytes of slots taken in each tier."""
        counted = self._tiers.stats()
        return {"hbm": counted["hbm_nbytes_used"], "dram": counted["dram_nbytes_used"]}

    def throttle(self, link: str, bytes_per_second: float) -> None:
        """Slow a link down to study it; 0 lifts the limit. Raises `ConfigError` on its name."""
        self._tiers.throttle(link, bytes_per_second)

    def keep_log(self, on: bool) -> None:
        """Start or end keeping a log of what is decided about blocks."""
        self._tiers.keep_log(on)

    def take_log(self) -> Log:
        """Return what was logged since the last call."""
        return Log(*self._tiers.take_log())

    def close(self) -> None:
        """Cancel transfers and give the memory back. Waiting events get `RuntimeClosedError`."""
        for helper in (self._watch, self._pinning):
            if helper is not None:
                helper.stop()
        self._tiers.close()
        for space in list(self._spaces.values()):
            space.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TieredMemError("a runtime can't be pickled or copied: it is memory and threads")


def _make_tiers(
    budgets: Budgets, eviction: str, num_io_threads: int, backend: Backend
) -> _core.Tiers:
    def make(hbm_reserved: int, dram_reserved: int) -> _core.Tiers:
        return _core.Tiers(
            hbm=budgets.hbm,
            dram=budgets.dram,
            hbm_reserved=hbm_reserved,
            dram_reserved=dram_reserved,
            eviction=eviction,
            num_io_threads=num_io_threads,
            device=backend.core,
            copy_back=backend.copy_back,
        )

    # Address space is reserved for growth; memory is taken only as blocks arrive. Memory that a GPU
    # shares may have to be page-locked, and so is taken at once.
    total = psutil.virtual_memory().total
    try:
        return make(total if backend.name == "cpu" else budgets.hbm, total)
    except BudgetError as error:  # ulimit -v, or a kernel that counts what is reserved
        tiers = make(budgets.hbm, budgets.dram)
        logger.warning("%s; the budgets alone can be had, but can't grow", error)
        return tiers

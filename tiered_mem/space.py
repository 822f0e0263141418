"""One model's blocks on a runtime, and the events that read them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiered_mem.catalogue import ALIGNMENT, round_up
from tiered_mem.errors import ChecksumError, ConfigError, RuntimeClosedError
from tiered_mem.keys import BlockKey
from tiered_mem.reading import GIVEN_BACK, Reading, Resident
from tiered_mem.store import Store

if TYPE_CHECKING:
    from tiered_mem.runtime import Runtime

logger = logging.getLogger(__name__)

_NUM_HINTS_TO_JUDGE = 256
#: Fills `out` (uint8) with the bytes of a block that is damaged in the store, from their source.
Repair = Callable[[BlockKey, npt.NDArray[np.uint8]], None]


class Space:
    """One model's blocks on a runtime. Made by `Runtime.attach`; safe to share between threads."""

    def __init__(self, runtime: Runtime, number: int, store: Store, repair: Repair | None) -> None:
        self.runtime = runtime
        self._number = number
        self._store = store
        self._repair = repair
        self.tiers = runtime._tiers
        self.backend = runtime.backend
        # Places are right as long as this read transaction is open.
        self._snapshot = store.snapshot()
        self._nbytes: dict[int, int] = {}
        self._num_blocks: dict[int, int] = {}
        self._bases: dict[int, np.uint64] = {}
        self._closed = False
        try:
            self.memory = np.empty(0, np.uint8)  # of a device: it is reached by addresses
            if self.backend.in_place:
                self.memory = np.frombuffer(memoryview(self.tiers.hbm_memory()), np.uint8)
            self._tensor: Any = None
            self._add_blocks()
        except BaseException:
            self._snapshot.close()
            raise

    def _add_blocks(self) -> None:
        packed = self._snapshot.keys()
        keys = [BlockKey.unpack(int(key)) for key in packed]
        try:
            extents = self._snapshot.extents(keys)
        except ChecksumError as error:
            raise ChecksumError(
                f"{error}; tiered-mem verify {self._store.path} --repair CHECKPOINT mends the store"
            ) from error
        for key, extent in zip(keys, extents, strict=True):
            self._num_blocks[key.layer] = max(self._num_blocks.get(key.layer, 0), key.index + 1)
            if key.layer not in self._nbytes:
                self._nbytes[key.layer] = extent.nbytes
                base = BlockKey(key.kind, key.layer, 0, self._number).pack()
                self._bases[key.layer] = np.uint64(base)
        named = np.array([key._replace(space=self._number).pack() for key in keys], np.uint64)
        self.tiers.add_blocks(named, extents)
        layers = np.array([key.layer for key in keys])
        self._layers = {layer: named[layers == layer] for layer in self._nbytes}
        self.largest_slot = round_up(max(self._nbytes.values(), default=0), ALIGNMENT)

    @property
    def closed(self) -> bool:
        return self._closed or self.runtime.closed

    def begin(self, layer: int, indices: Sequence[int]) -> Reading:
        """Start an event: blocks `indices` (distinct) of `layer`. Their transfers start now.

        Raises `RuntimeClosedError`, `ConfigError` for unknown blocks, `EventTooLargeError` if not
        even one block fits.
        """
        keys = self._keys(layer, indices)
        return Reading(self, keys, self._nbytes[layer], threading.get_ident())

    def begin_resident(self, layer: int) -> Resident | None:
        """Pin all blocks of a layer if all are in HBM; None if one isn't.

        Returns a context manager with their `slots`, in order. What is computed on the current
        stream inside it comes after their arrival, and before they are replaced. Nothing is counted
        and no policy is told: `note_uses` does that, when it is known. Raises `RuntimeClosedError`.
        """
        if self._closed:
            raise RuntimeClosedError(GIVEN_BACK)
        keys = self._layers.get(layer)
        if keys is None or len(keys) < self._num_blocks[layer]:
            return None
        event = self.tiers.acquire_resident(keys, threading.get_ident())
        return None if event is None else Resident(event, self.backend)

    def note_uses(self, layer: int, indices: Sequence[int]) -> None:
        """Count an event that used blocks inside `begin_resident`, and tell the policy."""
        if self._closed:
            return
        try:
            self.tiers.note_uses(self._keys(layer, indices))
        except RuntimeClosedError:
            if not self.closed:
                raise

    def view(self, slot: int, nbytes: int) -> Any:
        """Return the bytes of a slot as a tensor on the device: uint8, [nbytes], not a copy.

        They are the block's as long as the event holds it, for what is computed on the stream that
        was the current one when the block arrived.
        """
        if not self.backend.in_place:
            return self.backend.view(slot, nbytes)
        if self._tensor is None:
            if self._closed:
                raise RuntimeClosedError(GIVEN_BACK)
            self._tensor = self.backend.wrap(self.memory)
        return self._tensor[slot : slot + nbytes]

    def hint(self, layer: int, indices: Sequence[int], *, exact: bool = False) -> None:
        """Predict the next event of `layer`, the likeliest block first. Moves nothing by itself."""
        if len(indices) and not self._closed:
            try:
                self.tiers.hint(self._keys(layer, indices), threading.get_ident(), exact)
            except (RuntimeClosedError, ConfigError):
                if not self.closed:
                    raise

    def resident(self, layer: int, index: int) -> bool:
        """Whether a block is in HBM and ready."""
        return bool(self.tiers.resident(int(self._bases[layer]) | index))

    def layer_resident(self, layer: int) -> bool:
        """Whether all blocks of a layer are in HBM and ready: then no prediction can help it."""
        keys = self._layers[layer]
        return self.tiers.num_resident(keys) == len(keys)

    def precision(self) -> dict[int, tuple[int, int, bool]]:
        """Return, by layer, (hints of missing blocks, those that came true, prefetch is on)."""
        own = range(self._number << 16, (self._number + 1) << 16)
        seen = self.tiers.precision().items()
        return {p & 0xFFFF: v for p, v in seen if p & 0xFFFFFF in own}

    def prefetch_pays(self, layer: int) -> bool:
        """Whether hints for a layer lead to transfers now, or too few have come true or not yet."""
        num_hints, _, on = self.precision().get(layer, (0, 0, False))
        return on or num_hints < _NUM_HINTS_TO_JUDGE

    def fill(
        self, keys: Sequence[BlockKey], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Read blocks ahead of any event, in order, until HBM and DRAM are full.

        What is there already stays. `progress` is called with (bytes done, bytes in all). Raises
        `RuntimeClosedError`, `TransferError`, `ChecksumError`.
        """
        if self.closed:
            raise RuntimeClosedError(GIVEN_BACK)
        budgets, used = self.runtime.budgets, self.runtime.nbytes_used()
        room = [budgets.dram - used["dram"], budgets.hbm - used["hbm"]]
        chosen: dict[int, list[int]] = {}
        total = 0
        for key in keys:
            slot_nbytes = round_up(self._nbytes[key.layer], ALIGNMENT)
            tier = next((t for t in (0, 1) if room[t] >= slot_nbytes), None)
            if tier is not None and not self.resident(key.layer, key.index):
                room[tier] -= slot_nbytes
                total += self._nbytes[key.layer]
                chosen.setdefault(key.layer, []).append(key.index)
        done = 0
        # What comes first is pushed out of HBM into DRAM by what follows.
        for layer, indices in chosen.items():
            with self.begin(layer, indices) as reading:
                for _ in reading:
                    done += self._nbytes[layer]
                    if progress is not None:
                        progress(done, total)

    def close(self) -> None:
        """Forget the model's blocks, once its events and transfers have ended, and its store."""
        if self._closed:
            return
        self._closed = True
        self.tiers.remove_space(self._number)
        self.memory = np.empty(0, np.uint8)
        self._tensor = None
        self._snapshot.close()
        with self.runtime._lock:
            self.runtime._spaces.pop(self._number, None)

    def _keys(self, layer: int, indices: Sequence[int]) -> npt.NDArray[np.uint64]:
        if self._closed:
            raise RuntimeClosedError(GIVEN_BACK)
        try:
            base = self._bases[layer]
        except KeyError:
            raise ConfigError(f"layer {layer} has no blocks in {self._store.path}") from None
        # An id out of range would name a block of another layer.
        if len(indices) and not 0 <= min(indices) <= max(indices) < self._num_blocks[layer]:
            unknown = next(i for i in indices if not 0 <= i < self._num_blocks[layer])
            raise ConfigError(
                f"block {unknown} of layer {layer} is unknown: there are 0 to "
                f"{self._num_blocks[layer] - 1}"
            )
        return np.array(indices, np.uint64) | base

    @property
    def given_back(self) -> bool:
        return self._closed

    def mend(self, key: BlockKey, slot: int, error: ChecksumError) -> None:
        """Fill the slot of a block that is damaged in the store from its source."""
        key = key._replace(space=0)
        if self._repair is None:
            raise ChecksumError(f"{key} has no source to be read from again: {error}") from error
        logger.warning(
            "%s: %s; reading it from its source (tiered-mem verify --repair mends the store)",
            key,
            error,
        )
        nbytes = self._nbytes[key.layer]
        if self.backend.in_place:
            self._repair(key, self.memory[slot : slot + nbytes])
            return
        block = np.empty(nbytes, np.uint8)
        self._repair(key, block)
        self.backend.write(slot, block)

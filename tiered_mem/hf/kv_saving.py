"""Saving the groups of caches in a thread of its own, while their models go on generating."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiered_mem.hf.kv_cache import TieredCache
from tiered_mem.hf.kv_states import SavedWindow
from tiered_mem.kv_space import KvSpace
from tiered_mem.prefix_index import group_hash

_MOST_NBYTES = 512 << 20  # in one transaction, if a group isn't larger

TokenIds = npt.NDArray[np.int64]


class Chain:
    """The groups of one cache on their way to the store. `error` stopped it."""

    def __init__(self, cache: TieredCache, parent: bytes, num_groups: int) -> None:
        """Go on after `num_groups` groups, the last of which is `parent`, that are stored."""
        self.cache = cache
        self.error: Exception | None = None
        self.reported = False
        self._parent = parent
        self._num_groups = num_groups

    def may_advance(self, num_tokens: int, block_tokens: int) -> bool:
        return self.error is None and num_tokens // block_tokens > self._num_groups

    def advance(self, ids: TokenIds, block_tokens: int) -> list[Pending]:
        """Return the groups that are sealed in all layers since the last call.

        `ids` are the tokens of the cache, and maybe more. The groups have their blocks: one more
        user of each, until `Pending.release`.
        """
        layers = self.cache.tiered_layers()
        if any(len(layer.rows) != 1 for layer in layers):
            return []
        windows = [layer for layer in self.cache.layers if isinstance(layer, SavedWindow)]
        num_sealed = min(layer.num_sealed for layer in layers) // block_tokens
        first, self._num_groups = self._num_groups, max(num_sealed, self._num_groups)
        found = []
        for number in range(first, num_sealed):
            tokens = ids[number * block_tokens : (number + 1) * block_tokens]
            blocks = [(layer.number, layer.rows[0][number]) for layer in layers]
            blocks += [
                (window.number, window.blocks[number])
                for window in windows
                if number in window.blocks
            ]
            found.append(Pending(self, layers[0].space, self._parent, tokens, blocks))
            self._parent = found[-1].hash
        return found


@dataclass
class Pending:
    """A sealed group that isn't stored yet. `blocks` are (layer, index in the space)."""

    chain: Chain
    space: KvSpace
    parent: bytes
    token_ids: TokenIds
    blocks: Sequence[tuple[int, int]]
    hash: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.hash = group_hash(self.parent, self.token_ids)
        self.space.share_all(self.blocks)

    @property
    def nbytes(self) -> int:
        return sum(self.space.block_nbytes(layer) for layer, _ in self.blocks)

    def release(self) -> None:
        self.space.release_all(self.blocks)


class Saver:
    """A thread that saves groups in the order they are given, as long as there are any.

    What waits has no bytes of its own: its blocks lie where all blocks of the space do.
    """

    def __init__(self, save: Callable[[list[Pending]], None], capacity: int | None) -> None:
        """`save` stores groups of one chain. What it raises stops the chain."""
        self._save = save
        # Of a small store, a part of a chain fits where the whole doesn't.
        self._most_nbytes = _MOST_NBYTES if capacity is None else min(_MOST_NBYTES, capacity // 16)
        self._waiting: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, groups: Sequence[Pending]) -> None:
        if not groups:
            return
        with self._changed:
            self._waiting.extend(groups)
            if self._thread is None:
                # A daemon: at exit it is waited for by whoever closes the store, if anybody does.
                self._thread = threading.Thread(
                    target=self._run, name="tiered-mem prefixes", daemon=True
                )
                self._thread.start()

    def drain(self) -> None:
        """Wait until all that was given is stored, or has failed."""
        with self._changed:
            if self._thread is not threading.current_thread():  # in a finalizer it may be
                self._changed.wait_for(lambda: self._thread is None)

    def _run(self) -> None:
        while batch := self._next():
            chain = batch[0].chain
            try:
                if chain.error is None:
                    self._save(batch)
            except Exception as error:  # reported by whoever owns the chain
                chain.error = error
            finally:
                for group in batch:
                    group.release()

    def _next(self) -> list[Pending]:
        """Return the next groups of one chain; none ends the thread."""
        with self._changed:
            batch: list[Pending] = []
            nbytes = 0
            while self._waiting and (not batch or self._waiting[0].chain is batch[0].chain):
                nbytes += self._waiting[0].nbytes
                if batch and nbytes > self._most_nbytes:
                    break
                batch.append(self._waiting.popleft())
            if not batch:
                self._thread = None
                self._changed.notify_all()
            return batch

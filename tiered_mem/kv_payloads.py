"""The blocks of a space as payloads to be written: from where they lie, or copied."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiered_mem.catalogue import ALIGNMENT, Bytes
from tiered_mem.kv_space import KvSpace
from tiered_mem.reading import Resident

Names = Sequence[tuple[int, int]]
"""Blocks, by (layer, index)."""


class LentBlocks:
    """Blocks pinned in HBM until they are given back."""

    def __init__(self, resident: Resident, blocks: Sequence[Bytes]) -> None:
        self._resident = resident.__enter__()
        self.blocks = blocks

    def give_back(self) -> None:
        self._resident.__exit__()


class KvPayloads:
    """What `payload_file.Owner` asks of a space."""

    def __init__(self, space: KvSpace) -> None:
        self._space = space

    def lend(self, names: Names) -> LentBlocks | None:
        """Pin blocks, to be written from where they lie.

        None if they aren't all in HBM, that isn't host memory, or they don't fill their pages.
        """
        space = self._space
        sizes = [space.block_nbytes(layer) for layer, _ in names]
        if space.backend.name != "cpu" or any(size % ALIGNMENT for size in sizes):
            return None
        memory = space.memory().numpy()
        event = self._acquire_resident(names)
        if event is None:
            return None
        resident = Resident(event, space.backend)
        blocks = [memory[at : at + size] for at, size in zip(resident.slots, sizes, strict=True)]
        return LentBlocks(resident, blocks)

    def copy(self, names: Names, outs: Sequence[Bytes]) -> None:
        """Copy each block, as `KvSpace.read` does: quicker if all are in HBM."""
        event = self._acquire_resident(names)
        if event is None:
            for (layer, index), out in zip(names, outs, strict=True):
                self._space.read(layer, index, out)
            return
        with Resident(event, self._space.backend) as resident:
            for slot, out in zip(resident.slots, outs, strict=True):
                self._space.copy_slot(slot, out)

    def _acquire_resident(self, names: Names) -> Any:
        keys = np.array(self._space.pack_all(names), np.uint64)
        return self._space.tiers.acquire_resident(keys, threading.get_ident())

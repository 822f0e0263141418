"""Writes damaged and missing blocks of a store again from the checkpoint it was packed from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from tiered_mem.catalogue import Codec
from tiered_mem.errors import ChecksumError, StoreMismatchError
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.pack import PackReport, pack, require_match
from tiered_mem.keys import BlockKey
from tiered_mem.store import Store


def repair(
    path: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    damaged: Iterable[BlockKey],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Drop the `damaged` blocks of the store at `path`, then pack what it lacks.

    Killed in between, it leaves a store without those blocks, which a repair or pack completes.
    Blocks are written with the codec of those that are there.

    Raises `StoreMismatchError` if the store is of another checkpoint, before anything is dropped,
    and what `Store.open`, `Checkpoint.open` and `pack` raise.
    """
    with Store.open(path) as store:
        experts = store.metadata.get("experts", {})
        codec = _codec(store)
    if "dtype" not in experts:
        raise StoreMismatchError(f"the store {path} wasn't packed from a checkpoint")
    dequantised = bool(experts.get("dequantised", False))
    with Checkpoint.open(checkpoint, dtype=experts["dtype"], dequantise=dequantised) as source:
        with Store.open(path, mode="w") as store:
            require_match(store, source)
            with store.transaction() as txn:
                for key in damaged:
                    txn.delete(key)
        return pack(source, path, codec=codec, progress=progress)


def _codec(store: Store) -> str:
    with store.snapshot() as snapshot:
        for key in snapshot.keys().tolist():
            try:
                return "none" if snapshot.extent(key).codec == Codec.NONE else "zstd"
            except ChecksumError:
                continue  # this entry is among the damaged
    return "none"

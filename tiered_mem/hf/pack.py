"""Streams the experts of a checkpoint into a store, one expert = one block."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tiered_mem.catalogue import ALIGNMENT, Bytes, Codec, encode, round_up
from tiered_mem.config import format_size
from tiered_mem.errors import StoreFullError, StoreMismatchError, StoreMissingError
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store, allocate

TRANSACTION_NBYTES = 64 << 20
_FORMAT = 1  # of what this module writes into a store's metadata

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackReport:
    """What a pack did. Bytes are those of the blocks before any codec."""

    num_blocks: int
    num_packed: int
    nbytes: int
    nbytes_packed: int
    seconds: float
    layers_read_whole: tuple[int, ...]


def pack(
    checkpoint: Checkpoint,
    store_path: str | PathLike[str],
    *,
    codec: str = "none",
    capacity: int | None = None,
    progress: Progress | None = None,
    transaction_nbytes: int = TRANSACTION_NBYTES,
) -> PackReport:
    """Write every expert of `checkpoint` into the store at `store_path`, made if there is none.

    Blocks that an earlier, interrupted pack of the same checkpoint committed are kept. Holds one
    expert in memory (one layer where the checkpoint must be converted by whole layers) and one
    transaction of `transaction_nbytes`. `capacity` bounds the store in bytes; `progress` is called
    with (bytes in the store, bytes of all blocks).

    Raises:
        StoreFullError: the disk or `capacity` is too small, found before the first write; or ran
            full on the way: what was committed stays valid, and a later pack goes on from there.
        StoreMismatchError: the store holds another checkpoint, dtype or layout.
        StoreBusyError, StoreReadOnlyError: as `Store.open`.
        CheckpointError: a file of the checkpoint changed under way.
    """
    started = time.perf_counter()
    path = Path(store_path)
    report = progress or (lambda done, total: None)
    Codec.choose(codec, itemsize=1)  # an unknown one is refused even if there is nothing to pack
    complete = open_packed(checkpoint, path)
    if complete is not None:
        complete.close()
        report(checkpoint.nbytes, checkpoint.nbytes)
        return _report(checkpoint, [], started)
    keys = list(block_keys(checkpoint))
    if not path.exists():
        _require_space(checkpoint, keys, path, codec, capacity)
    with Store.open(path, mode="w", capacity=capacity) as store:
        if "experts" in store.metadata:
            require_match(store, checkpoint)
        else:
            store.set_metadata(store.metadata | {"experts": describe(checkpoint)})
        with store.snapshot() as snapshot:
            missing = [key for key in keys if key not in snapshot]
        _require_space(checkpoint, missing, path, codec, capacity)
        _write(checkpoint, store, missing, codec, transaction_nbytes, report)
    return _report(checkpoint, missing, started)


def open_packed(checkpoint: Checkpoint, store_path: str | PathLike[str]) -> Store | None:
    """Open the store for reading if it holds every expert; None if there is something to pack.

    Raises `StoreMismatchError` if the store holds another checkpoint, dtype or layout, and what
    `Store.open` raises for one that is damaged or can't be read.
    """
    try:
        store = Store.open(store_path)
    except StoreMissingError:
        return None
    try:
        if "experts" in store.metadata:
            require_match(store, checkpoint)
            with store.snapshot() as snapshot:
                if all(key in snapshot for key in block_keys(checkpoint)):
                    return store
    except BaseException:
        store.close()
        raise
    store.close()
    return None


def block_keys(checkpoint: Checkpoint) -> Iterator[BlockKey]:
    """Yield the key of each expert, in the order of the checkpoint's layers."""
    for layer in range(checkpoint.num_layers):
        for index in range(checkpoint.num_experts(layer)):
            yield BlockKey(Kind.EXPERT, layer, index)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a store's metadata says of the experts in it, as plain JSON values."""
    return {
        "format": _FORMAT,
        "checkpoint": checkpoint.name,
        "model_type": checkpoint.model_type,
        "fingerprint": checkpoint.fingerprint,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "dequantised": not checkpoint.keeps_stored,
        "modules": checkpoint.names,
        "layouts": [layout.to_json() for layout in checkpoint.layouts],
    }


def require_match(store: Store, checkpoint: Checkpoint) -> None:
    """Raise `StoreMismatchError` unless the store's experts are this checkpoint's, in its layout.

    The checkpoint's name may differ: the same files may have moved.
    """
    theirs, ours = store.metadata.get("experts"), describe(checkpoint)
    if theirs is None:
        raise StoreMismatchError(f"the store {store.path} holds no experts; pack the checkpoint")
    for what in ("format", "model_type", "dtype", "fingerprint", "modules", "layouts"):
        if theirs.get(what) != ours[what]:
            raise StoreMismatchError(
                f"the store {store.path} was packed from {_name(theirs)}, not from {_name(ours)}: "
                f"they differ in {what}; give another store, or delete this one and pack again"
            )


def _report(checkpoint: Checkpoint, packed: list[BlockKey], started: float) -> PackReport:
    layers = range(checkpoint.num_layers)
    return PackReport(
        num_blocks=checkpoint.num_blocks,
        num_packed=len(packed),
        nbytes=checkpoint.nbytes,
        nbytes_packed=_nbytes(checkpoint, packed),
        seconds=time.perf_counter() - started,
        layers_read_whole=tuple(layer for layer in layers if checkpoint.reads_whole(layer)),
    )


def _name(description: dict[str, Any]) -> str:
    return (
        f"{description.get('checkpoint')} ({description.get('model_type')}, "
        f"{description.get('dtype')}, fingerprint {str(description.get('fingerprint'))[:12]}, "
        f"format {description.get('format')})"
    )


def _write(
    checkpoint: Checkpoint,
    store: Store,
    keys: list[BlockKey],
    codec: str,
    transaction_nbytes: int,
    report: Progress,
) -> None:
    done = checkpoint.nbytes - _nbytes(checkpoint, keys)
    report(done, checkpoint.nbytes)
    with closing(_blocks(checkpoint, keys)) as blocks:
        for count in _transactions(checkpoint, keys, transaction_nbytes):
            try:
                with store.transaction() as txn:
                    for key, block in islice(blocks, count):
                        itemsize = checkpoint.layouts[key.layer].itemsize
                        txn.put(key, block, codec=codec, itemsize=itemsize)
                        done += block.nbytes
            except StoreFullError as error:
                raise StoreFullError(
                    f"{error}; the blocks committed so far stay valid: make room and pack again to "
                    "go on from there"
                ) from error
            report(done, checkpoint.nbytes)


def _blocks(
    checkpoint: Checkpoint, keys: Iterable[BlockKey]
) -> Generator[tuple[BlockKey, Bytes], None, None]:
    """Yield each key with its block, a uint8 array that is good until the next is asked for."""
    for layer, group in groupby(keys, key=lambda key: key.layer):
        block = allocate(checkpoint.layouts[layer].nbytes)
        with checkpoint.reader(layer) as reader:
            for key in group:
                reader.read(key.index, torch.from_numpy(block))
                yield key, block


def _transactions(checkpoint: Checkpoint, keys: list[BlockKey], limit: int) -> Iterator[int]:
    """Yield how many of the keys go into each transaction: as many as fit, at least one."""
    count = nbytes = 0
    for key in keys:
        size = checkpoint.layouts[key.layer].nbytes
        if count and nbytes + size > limit:
            yield count
            count = nbytes = 0
        count += 1
        nbytes += size
    if count:
        yield count


def _nbytes(checkpoint: Checkpoint, keys: Iterable[BlockKey]) -> int:
    return sum(checkpoint.layouts[key.layer].nbytes for key in keys)


def _require_space(
    checkpoint: Checkpoint, keys: list[BlockKey], path: Path, codec: str, capacity: int | None
) -> None:
    """Raise `StoreFullError` if `keys` don't fit on the disk, or all blocks in `capacity`."""
    ratio = _ratio(checkpoint, keys, codec)
    size = f"{checkpoint.num_blocks} experts of {checkpoint.name}"
    needed = _stored_nbytes(checkpoint, block_keys(checkpoint), ratio)
    if capacity is not None and needed > capacity:
        raise StoreFullError(
            f"{size} take {format_size(needed)} in a store, its capacity is "
            f"{format_size(capacity)}: give more"
        )
    needed = _stored_nbytes(checkpoint, keys, ratio)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise StoreFullError(
            f"{len(keys)} of {size} still to pack take {format_size(needed)} in a store, "
            f"{format_size(free)} are free under {existing}: make room, give another path, or pack "
            "with codec zstd"
        )


def _stored_nbytes(checkpoint: Checkpoint, keys: Iterable[BlockKey], ratio: float) -> int:
    """Bytes on disk: each payload in whole pages after a page of its own, and 1 % for the trees."""
    nbytes = 1 << 20
    for key in keys:
        payload = int(checkpoint.layouts[key.layer].nbytes * ratio)
        nbytes += round_up(payload, ALIGNMENT) + ALIGNMENT
    return nbytes + nbytes // 100


def _ratio(checkpoint: Checkpoint, keys: list[BlockKey], codec: str) -> float:
    """Stored bytes per byte, for a compressing codec as the first expert compresses, plus 5 %."""
    layout = checkpoint.layouts[keys[0].layer] if keys else checkpoint.layouts[0]
    chosen = Codec.choose(codec, layout.itemsize)
    if chosen is Codec.NONE or not keys:
        return 1.0
    block = allocate(layout.nbytes)
    checkpoint.read_expert(keys[0].layer, keys[0].index, torch.from_numpy(block))
    value, _ = encode(block, chosen)
    return min(1.0, 1.05 * value.nbytes / layout.nbytes)

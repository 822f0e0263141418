"""libCacheSim's oracleGeneral: packed records of time, object, size and next access.

Little-endian: uint32 time, uint64 object id, uint32 size, int64 number of the request that asks
for the object next (the highest int64, or -1, if none does). Files may be compressed with zstd.
Source: https://github.com/1a1a11a/libCacheSim.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tiered_mem.atomic_file import new_file
from tiered_mem.errors import TraceError
from tiered_mem.keys import BlockKey, Kind, pack_keys, unpack_keys
from tiered_mem.trace import Form, Trace, TraceHeader
from tiered_mem.trace_columns import rank
from tiered_mem.trace_formats.prefix_jsonl import number_blocks
from tiered_mem.trace_formats.source import Source

RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("nbytes", "<u4"), ("next", "<i8")])
NEVER = np.iinfo(np.int64).max


def recognise(start: bytes) -> bool:
    # The first record's next access: none, or a later request, and one that can be.
    if len(start) < RECORD.itemsize or (start.isascii() and b"\0" not in start):
        return False
    following = int(np.frombuffer(start, RECORD, 1)["next"][0])
    return following in (-1, NEVER) or 0 < following < 1 << 40


def read(source: Source) -> Trace:
    """Return the trace, every record an event. Raises `TraceError`, naming the record.

    Requests of 0 bytes are left out, as libCacheSim does, with a warning, and so a block's size is
    the one it came with first. Ids that are packed block keys, as `write` makes them, become those
    blocks again; all others are blocks of KV, renumbered if they don't fit 32 bits.
    """
    if len(source.data) % RECORD.itemsize:
        whole = len(source.data) // RECORD.itemsize
        raise source.error(
            f"it is cut off after record {whole - 1}, or not oracleGeneral: {len(source.data)} "
            f"bytes are not records of {RECORD.itemsize}"
        )
    records = np.frombuffer(source.data, RECORD)
    following = records["next"]
    wrong = (following <= np.arange(len(records))) & (following != -1)
    if wrong.any():
        first = int(wrong.argmax())
        raise source.error(
            f"record {first}: its next access is {following[first]}, which is not later; is it "
            "oracleGeneral?"
        )
    kept = records[records["nbytes"] > 0]
    if num_empty := len(records) - len(kept):
        warnings.warn(f"{source.path}: {num_empty} requests of 0 bytes left out", stacklevel=2)
    if not len(kept):
        raise source.error("no request has a size")
    kinds, layers, indices = _name_blocks(kept["id"])
    distinct, block_ids = rank(pack_keys(kinds, layers, indices))
    sizes = np.empty(len(distinct), np.uint64)
    sizes[block_ids[::-1]] = kept["nbytes"][::-1]  # of equal places the last one written stays
    if num_resized := int((sizes[block_ids] != kept["nbytes"]).sum()):
        warnings.warn(
            f"{source.path}: {num_resized} requests name another size than the first one for their "
            "block, which is taken",
            stacklevel=2,
        )
    header = TraceHeader(
        Form.REQUESTS,
        source=source.path.name,
        note=f"{num_empty} requests of 0 bytes left out" if num_empty else "",
    )
    return Trace.from_rows(
        header,
        step=np.arange(len(kept), dtype=np.uint32),
        layer=layers,
        kind=kinds,
        index=indices,
        block_nbytes=sizes,
        name=source.name,
    )


def write(trace: Trace, path: Path, *, overwrite: bool = False) -> None:
    """Write a trace's rows as records, compressed if `path` ends in .zst: whole, or not at all.

    The time is the row's step, the id the packed block key. Raises `TraceError` on a block of 4 GiB
    or more, which a record can't hold; `FileExistsError` as `new_file`.
    """
    distinct, block_ids = rank(trace.flat_keys)
    sizes = trace.blocks[1]
    if (too_large := np.flatnonzero(sizes >= 1 << 32)).size:
        block = BlockKey.unpack(int(distinct[too_large[0]]))
        raise TraceError(
            f"{trace.name}: {block} has {sizes[too_large[0]]} bytes, but oracleGeneral holds sizes "
            "below 4 GiB"
        )
    records = np.empty(trace.num_rows, RECORD)
    records["time"] = trace.row_step
    records["id"] = trace.flat_keys
    records["nbytes"] = sizes[block_ids]
    records["next"] = next_access(block_ids)
    with new_file(path, overwrite=overwrite) as file:
        if path.suffix == ".zst":
            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
                stream.write(records.data.cast("B"))
        else:
            records.tofile(file)


def next_access(block_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each access the number of the next one to the same block, or `NEVER`."""
    order = np.argsort(block_ids, kind="stable")
    same = block_ids[order[1:]] == block_ids[order[:-1]]
    following = np.full(len(block_ids), NEVER)
    following[order[:-1][same]] = order[1:][same]
    return following


def _name_blocks(
    ids: npt.NDArray[np.uint64],
) -> tuple[npt.ArrayLike, npt.ArrayLike, npt.NDArray[Any]]:
    """Return kind, layer and index of the ids."""
    kinds, layers, indices = unpack_keys(ids)
    spaces = ids >> np.uint64(48) & np.uint64(0xFF)
    if kinds.min() >= min(Kind) and kinds.max() <= max(Kind) and not spaces.any():
        return kinds, layers, indices
    return Kind.KV, 0, number_blocks(ids)

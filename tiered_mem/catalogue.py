"""What a store writes: catalogue entries and encoded payloads. Pure bytes, no LMDB."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tiered_mem import _core
from tiered_mem.errors import ConfigError

Bytes = npt.NDArray[np.uint8]
Table = npt.NDArray[np.uint32]

CHUNK_NBYTES: int = _core.CHUNK_NBYTES
ALIGNMENT: int = _core.IO_ALIGNMENT
PAGE_HEADER_NBYTES = 16
# A large LMDB value starts right after the header of its first page, so this many bytes in front of
# a payload make it start at a multiple of ALIGNMENT in the file, where O_DIRECT can fetch it.
PAD_NBYTES = ALIGNMENT - PAGE_HEADER_NBYTES
# Level 1 compresses real bf16 weights within 1 % of level 3, at twice the speed.
ZSTD_LEVEL = 1

_CRC = struct.Struct("<I")
_FIELDS = struct.Struct("<B?2xQQQ")
_APART_AT = _CRC.size + 1  # of the bytes of an entry


class Codec(IntEnum):
    """How a chunk is stored. The numbers are those of csrc/codec.h."""

    NONE = 0
    ZSTD = 1
    ZSTD_PLANES2 = 2

    @classmethod
    def choose(cls, name: str, itemsize: int) -> Codec:
        """Return the codec for `name` and elements of `itemsize` bytes.

        Raises `ConfigError` if there is no such codec, or none of its blocks could be read here.
        """
        if name == "none":
            return cls.NONE
        if name == "zstd":
            if not _can_read_zstd():
                raise ConfigError(
                    "codec 'zstd' can't be used here: libzstd.so.1, which reads it, is not on this "
                    "machine: install it (Debian, Ubuntu: libzstd1; Fedora: libzstd), or use 'none'"
                )
            return cls.ZSTD_PLANES2 if itemsize == 2 else cls.ZSTD
        raise ConfigError(f"unknown codec {name!r}: use 'none' or 'zstd'")


@cache
def _can_read_zstd() -> bool:
    """Whether csrc/codec.cpp will find its library, which isn't the one that compresses here."""
    try:
        ctypes.CDLL("libzstd.so.1")
    except OSError:
        return False
    return True


def pack_entry(
    key: bytes,
    codec: Codec,
    *,
    nbytes: int,
    generation: int,
    offset: int,
    table: Table,
    apart: bool = False,
) -> bytes:
    """Return a block's line in the catalogue, to be read by `_core.parse_entry`.

    `nbytes` is the raw size, `offset` where the first chunk starts in the file. `table` has one row
    a chunk: stored bytes, raw bytes, CRC-32C of the stored bytes. `apart`: it lies in the file of
    payloads, not in LMDB's. The entry's own checksum covers `key`, so that it can't serve another
    one.
    """
    fields = _FIELDS.pack(codec, apart, nbytes, generation, offset)
    body = fields + table.astype("<u4", copy=False).tobytes()
    return _CRC.pack(_core.crc32c(key + body)) + body


def lies_apart(entry: Any) -> bool:
    """Whether an entry's payload is in the file of payloads. Checks nothing: parse it there."""
    return len(entry) > _APART_AT and entry[_APART_AT] != 0


def allocate(nbytes: int) -> Bytes:
    """Return an empty block of `nbytes` bytes, aligned for `Snapshot.read`.

    `Transaction.put` writes such an array (itself, not a view or a copy of it) without copying it
    first: the pad that a stored payload needs lies in front of it already.
    """
    if nbytes < 0:
        raise ConfigError(f"a block can't have {nbytes} bytes")
    # Room up to the next page lets O_DIRECT deliver the block's tail in place.
    length = ALIGNMENT + max(round_up(nbytes, ALIGNMENT), ALIGNMENT)
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: only speed is lost
        # O_DIRECT names every page to the device: huge ones double its bandwidth on some.
        pages.madvise(mmap.MADV_HUGEPAGE)
    staged = np.frombuffer(pages, np.uint8)[PAGE_HEADER_NBYTES : ALIGNMENT + nbytes]
    return _Staged.wrap(staged)


class _Staged(np.ndarray[Any, np.dtype[np.uint8]]):
    """A block whose memory starts PAD_NBYTES before it. Views and copies of it forget that."""

    padded: Bytes | None = None

    @classmethod
    def wrap(cls, padded: Bytes) -> _Staged:
        block = padded[PAD_NBYTES:].view(cls)
        block.padded = padded
        return block


def encode(data: Any, codec: Codec) -> tuple[Bytes, Table]:
    """Return `data`, a contiguous buffer, as a payload with its pad in front, and its chunk table.

    Raises `ConfigError` if it isn't contiguous.
    """
    raw = as_bytes(data)
    if codec is Codec.NONE:
        if isinstance(data, _Staged) and data.padded is not None:
            return data.padded, plain_table(raw)
        value = np.empty(PAD_NBYTES + raw.nbytes, np.uint8)
        value[:PAD_NBYTES] = 0
        value[PAD_NBYTES:] = raw
        return value, plain_table(raw)
    chunks = list(_chunks(raw))
    stored = _compress_all(chunks, byte_planes=codec is Codec.ZSTD_PLANES2)
    value = np.zeros(PAD_NBYTES + sum(round_up(len(s), ALIGNMENT) for s in stored), np.uint8)
    start = PAD_NBYTES
    for piece in stored:
        value[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
        start += round_up(len(piece), ALIGNMENT)
    rows = [(len(s), c.nbytes, _core.crc32c(s)) for s, c in zip(stored, chunks, strict=True)]
    return value, np.array(rows, np.uint32).reshape(-1, 3)


def plain_table(raw: Bytes) -> Table:
    """Return the chunk table of a payload that is stored as it is."""
    rows = [(chunk.nbytes, chunk.nbytes, _core.crc32c(chunk.data)) for chunk in _chunks(raw)]
    return np.array(rows, np.uint32).reshape(-1, 3)


def round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def _compress_all(chunks: list[Bytes], *, byte_planes: bool) -> list[bytes]:
    def compress(chunk: Bytes) -> bytes:
        arranged = _planes(chunk) if byte_planes else np.ascontiguousarray(chunk)
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(arranged.data)

    if len(chunks) < 2:
        return [compress(chunk) for chunk in chunks]
    with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as pool:
        return list(pool.map(compress, chunks))


def _chunks(raw: Bytes) -> Iterator[Bytes]:
    return (raw[i : i + CHUNK_NBYTES] for i in range(0, raw.nbytes, CHUNK_NBYTES))


def _planes(chunk: Bytes) -> Bytes:
    """Split 2-byte elements: all first bytes, all second bytes, an odd tail byte.

    The exponents of 16-bit floats compress well once the mantissas are out of their way.
    """
    even = chunk.nbytes // 2 * 2
    return np.concatenate([chunk[:even:2], chunk[1:even:2], chunk[even:]])


def as_bytes(data: Any) -> Bytes:
    """Return a C-contiguous buffer as bytes, not copied. Raises `ConfigError` of any other."""
    view = memoryview(data)
    if not view.c_contiguous:
        raise ConfigError("a block is written from contiguous memory: copy it first")
    return np.frombuffer(view, np.uint8)

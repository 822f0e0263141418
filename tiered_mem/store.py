"""Blocks on NVMe: an LMDB environment whose large values are read by O_DIRECT at their offset.

LMDB is the catalogue, the allocator and the transaction log. A payload is one LMDB value, which
lies contiguous in the file and doesn't move until it is rewritten or deleted. Its place (file
offset) stands in its catalogue entry, and both commit in one transaction. A reader takes the place
from a read transaction and fetches the bytes by O_DIRECT while that transaction is open: pages
freed after it began aren't reused before it ends. No payload is read through LMDB's map, where
py-lmdb's `get` would touch every page of the value.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import lmdb
import numpy as np

from tiered_mem import _core
from tiered_mem.catalogue import (
    ALIGNMENT,
    PAD_NBYTES,
    PAGE_HEADER_NBYTES,
    Bytes,
    Codec,
    encode,
    pack_entry,
    plain_table,
    round_up,
)
from tiered_mem.environment import Environment, WriterLock, named_errors
from tiered_mem.errors import (
    ChecksumError,
    ConfigError,
    StoreBusyError,
    StoreError,
    StoreReadOnlyError,
    TransferError,
)
from tiered_mem.keys import BlockKey, KeyArray

_METADATA_KEY = b"metadata"
_PAGE_HEADER = struct.Struct("<QHHI")  # page number, -, flags, number of overflow pages
_OVERFLOW_FLAG = 0x04
_MAX_VALUE_NBYTES = 0xFFFFFFFF


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


class Store:
    """An open store. Safe to share between threads; a forked child must not use it."""

    def __init__(self, environment: Environment, writer_lock: WriterLock | None) -> None:
        self._environment = environment
        self._writer_lock = writer_lock
        self._transaction_lock = threading.Lock()
        self._snapshots: set[Snapshot] = set()
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        mode: Literal["r", "w"] = "r",
        capacity: int | None = None,
    ) -> Store:
        """Open the store in directory `path`; mode "w" creates it if there is none.

        Any number of processes may read a store while one writes it. `capacity` limits the bytes of
        its file (default: what the disk has free). Within a process, open for writing first:
        a store that is open for reading can't be opened for writing as well.

        Raises `StoreError` (no store there, truncated, not ours), `StoreMismatchError` (another
        version), `StoreBusyError` (another writer), `StoreReadOnlyError`, `StoreFullError`.
        """
        if mode not in ("r", "w"):
            raise ConfigError(f"unknown mode {mode!r}: use 'r' or 'w'")
        if capacity is not None and (mode == "r" or capacity <= 0):
            raise ConfigError("capacity is a positive number of bytes, given when opening to write")
        directory = Path(path)
        if mode == "r":
            return cls(Environment.open(directory), None)
        writer_lock = WriterLock(directory)
        try:
            return cls(Environment.create(directory, capacity), writer_lock)
        except BaseException:
            writer_lock.release()
            raise

    @property
    def path(self) -> Path:
        return self._environment.directory

    @property
    def writable(self) -> bool:
        return self._writer_lock is not None

    @property
    def direct(self) -> bool:
        """False where the filesystem has no O_DIRECT and reads go through the page cache."""
        return bool(self._environment.file.direct)

    @property
    def metadata(self) -> dict[str, Any]:
        """What `set_metadata` last committed; {} before that."""
        env = self._open_environment()
        txn = env.begin_read()
        try:
            packed = txn.get(_METADATA_KEY, b"{}", db=env.meta)
            return dict(json.loads(bytes(packed)))
        finally:
            env.end_read(txn)

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the metadata (JSON types only) in a transaction of its own."""
        with self.transaction() as txn:
            txn.set_metadata(metadata)

    def transaction(self) -> Transaction:
        """Begin a write transaction, to be used as a context manager by the calling thread.

        Raises `StoreReadOnlyError`, or `StoreBusyError` if one is open already.
        """
        env = self._open_environment()
        if self._writer_lock is None:
            raise StoreReadOnlyError(f"{self.path} is open for reading: open it with mode='w'")
        if not self._transaction_lock.acquire(blocking=False):
            raise StoreBusyError(f"{self.path} has an open transaction: end that one first")
        try:
            return Transaction(env, self._transaction_lock.release)
        except BaseException:
            self._transaction_lock.release()
            raise

    def snapshot(self) -> Snapshot:
        """Begin a read transaction: the store as of now, for as long as it is open."""
        snapshot = Snapshot(self._open_environment(), self._snapshots.discard)
        self._snapshots.add(snapshot)
        return snapshot

    def allocate(self, nbytes: int) -> Bytes:
        """Return an empty block that `put` takes without a copy: see `allocate`."""
        return allocate(nbytes)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[BlockKey]:
        """Read every block and return the keys of those that are damaged or can't be read.

        `progress` is called with (bytes done, bytes in all) after every block.
        """
        with self.snapshot() as snapshot:
            return _verify(snapshot, progress)

    def close(self) -> None:
        """End every snapshot and release the store. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        for snapshot in list(self._snapshots):
            snapshot.close()
        self._environment.release()
        if self._writer_lock is not None:
            self._writer_lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_environment(self) -> Environment:
        if self._closed:
            raise StoreError(f"{self.path} is closed")
        return self._environment


class Transaction:
    """Writes that take effect together when the `with` block ends, or not at all."""

    def __init__(self, environment: Environment, on_end: Callable[[], None]) -> None:
        self._environment = environment
        self._on_end = on_end
        with named_errors(environment.directory):
            self._first_new_page = environment.lmdb.info()["last_pgno"] + 1
            self._txn = environment.lmdb.begin(write=True, buffers=True)
        self._generation: int = self._txn.id()
        self._num_pages = 1024  # upper bound of pages this transaction may take: see _extend_file

    def put(self, key: BlockKey, data: Any, *, codec: str = "none", itemsize: int = 1) -> None:
        """Write a block, replacing the one it had.

        `data` is any C-contiguous buffer. Codec "zstd" is lossless; `itemsize` is the size in bytes
        of its elements, of which 2 (bfloat16, float16) lets zstd see their byte planes.
        """
        if key.space != 0:
            raise ConfigError(f"{key} is of space {key.space}: keys of a store have space 0")
        packed = _pack_key(key)
        chosen = Codec.choose(codec, itemsize)
        raw = _as_bytes(data)
        padded = data.padded if isinstance(data, _Staged) and chosen is Codec.NONE else None
        value, table = encode(raw, chosen) if padded is None else (padded, plain_table(raw))
        if value.nbytes > _MAX_VALUE_NBYTES:
            raise StoreError(
                f"{key} has {raw.nbytes} bytes: LMDB holds less than 4 GiB in one value"
            )
        with named_errors(self._environment.directory):
            self._count_pages(value.nbytes)
            self._txn.put(packed, value.data, db=self._environment.payload)
            offset = self._place(packed, value.nbytes) + PAD_NBYTES
            entry = pack_entry(
                packed,
                chosen,
                itemsize,
                nbytes=raw.nbytes,
                generation=self._generation,
                offset=offset,
                table=table,
            )
            self._txn.put(packed, entry, db=self._environment.catalogue)

    def delete(self, key: BlockKey) -> bool:
        """Remove a block. Returns whether there was one."""
        packed = _pack_key(key)
        with named_errors(self._environment.directory):
            self._count_pages(0)
            self._txn.delete(packed, db=self._environment.catalogue)
            return bool(self._txn.delete(packed, db=self._environment.payload))

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the store's metadata (JSON types only)."""
        packed = json.dumps(metadata, sort_keys=True, allow_nan=False).encode()
        with named_errors(self._environment.directory):
            self._count_pages(len(packed))
            self._txn.put(_METADATA_KEY, packed, db=self._environment.meta)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            written_nbytes = self._num_pages * self._environment.page_nbytes
            with named_errors(self._environment.directory, written_nbytes):
                if kind is None:
                    self._extend_file()
                    self._txn.commit()
        finally:
            self._txn.abort()  # does nothing after a commit
            self._on_end()

    def _place(self, packed: bytes, nbytes: int) -> int:
        """Return the file offset of the value just put.

        LMDB writes the final page number into the header in front of the value when it takes the
        pages, so the place is known before the commit and can commit with the payload.
        """
        value = self._txn.get(packed, db=self._environment.payload)
        if value is None:
            raise StoreError(f"LMDB lost the value just put into {self._environment.directory}")
        address = np.frombuffer(value, np.uint8).ctypes.data - PAGE_HEADER_NBYTES
        header = ctypes.string_at(address, PAGE_HEADER_NBYTES)
        page, _, flags, num_pages = _PAGE_HEADER.unpack(header)
        # A value rewritten within its transaction keeps the pages it has if they are enough.
        if not flags & _OVERFLOW_FLAG or num_pages < self._pages_of(nbytes):
            raise StoreError(
                f"LMDB {lmdb.version()} lays out its pages in an unknown way: install lmdb 3.0"
            )
        return int(page) * self._environment.page_nbytes + PAGE_HEADER_NBYTES

    def _pages_of(self, nbytes: int) -> int:
        return -(-(PAGE_HEADER_NBYTES + nbytes) // self._environment.page_nbytes)

    def _count_pages(self, nbytes: int) -> None:
        # The tree pages of one write: three paths of both databases, with room to spare.
        self._num_pages += self._pages_of(nbytes) + 32

    def _extend_file(self) -> None:
        """Make the file as long as the transaction may need, before it commits.

        LMDB doesn't write pages that a transaction took and gave back, so its file may be shorter
        than it says, as a truncated one is. Extended (sparsely), it is never shorter, and a shorter
        file is a damaged one.
        """
        needed = (self._first_new_page + self._num_pages) * self._environment.page_nbytes
        needed = min(needed, self._environment.lmdb.info()["map_size"])
        if os.stat(self._environment.data_path).st_size < needed:
            os.truncate(self._environment.data_path, needed)


class Snapshot:
    """The store at one moment. Places stay right exactly as long as it is open. Thread-safe."""

    def __init__(self, environment: Environment, on_end: Callable[[Snapshot], None]) -> None:
        self._environment = environment
        self._on_end = on_end
        self._lock = threading.Lock()  # LMDB wants one thread at a time in a transaction
        self._txn = environment.begin_read()
        self._closed = False

    def keys(self) -> KeyArray:
        """Return the packed keys of all blocks in ascending order, uint64."""
        with self._lock, self._named_errors():
            cursor = self._txn.cursor(db=self._environment.catalogue)
            packed = b"".join(bytes(key) for key in cursor.iternext(keys=True, values=False))
        return np.frombuffer(packed, ">u8").astype(np.uint64)

    def __len__(self) -> int:
        with self._lock, self._named_errors():
            return int(self._txn.stat(self._environment.catalogue)["entries"])

    def __contains__(self, key: BlockKey | int) -> bool:
        with self._lock, self._named_errors():
            return self._txn.get(_pack_key(key), db=self._environment.catalogue) is not None

    def nbytes(self, key: BlockKey | int) -> int:
        """Return a block's raw size. Raises as `extent`."""
        return self.extent(key).nbytes

    def extent(self, key: BlockKey | int) -> _core.Extent:
        """Return where a block's bytes lie, for the transfer engine. Keep the snapshot open.

        Raises `StoreError` if there is no such block, `ChecksumError` if its entry is damaged.
        """
        packed = _pack_key(key)
        with self._lock, self._named_errors():
            entry = self._txn.get(packed, db=self._environment.catalogue)
            if entry is not None:
                return self._parse(key, packed, entry)
        raise StoreError(f"no block {_name(key)} in {self._environment.directory}")

    def extents(self, keys: Iterable[BlockKey | int]) -> list[_core.Extent]:
        """Return the extents of several blocks, in order."""
        return [self.extent(key) for key in keys]

    def read(self, key: BlockKey | int, out: Any) -> None:
        """Read a block into `out`, a writable C-contiguous buffer of at least its size.

        The bytes land without a copy if `out` starts at a multiple of 4096 (see `allocate`) and the
        codec is none. Raises `ChecksumError`, `TransferError`, `StoreError`.
        """
        extent = self.extent(key)
        try:
            _core.read_block(extent, out)
        except (ChecksumError, TransferError) as error:
            raise type(error)(f"{_name(key)}: {error}") from error

    def close(self) -> None:
        """End the snapshot; its extents must not be read any more. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._environment.end_read(self._txn)
        self._on_end(self)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parse(self, key: BlockKey | int, packed: bytes, entry: Any) -> _core.Extent:
        try:
            return _core.parse_entry(self._environment.file, packed, entry)
        except ChecksumError as error:
            raise ChecksumError(f"{_name(key)}: {error}") from error

    def _named_errors(self) -> named_errors:
        return named_errors(self._environment.directory)


def _verify(snapshot: Snapshot, progress: Callable[[int, int], None] | None) -> list[BlockKey]:
    bad: list[BlockKey] = []
    sizes: dict[int, int] = {}
    for key in snapshot.keys().tolist():
        try:
            sizes[key] = snapshot.nbytes(key)
        except ChecksumError:
            bad.append(BlockKey.unpack(key))
    total, done = sum(sizes.values()), 0
    block = allocate(max(sizes.values(), default=0))
    for key, nbytes in sizes.items():
        try:
            snapshot.read(key, block)
        except (StoreError, TransferError):
            bad.append(BlockKey.unpack(key))
        done += nbytes
        if progress is not None:
            progress(done, total)
    return sorted(bad)


def _pack_key(key: BlockKey | int) -> bytes:
    packed = key.pack() if isinstance(key, BlockKey) else int(key)
    return packed.to_bytes(8, "big")  # so that LMDB sorts keys as numbers


def _name(key: BlockKey | int) -> str:
    return str(key) if isinstance(key, BlockKey) else str(BlockKey.unpack(int(key)))


def _as_bytes(data: Any) -> Bytes:
    view = memoryview(data)
    if not view.c_contiguous:
        raise ConfigError("a block is written from contiguous memory: copy it first")
    return np.frombuffer(view, np.uint8)

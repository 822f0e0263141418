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
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import lmdb
import numpy as np

from tiered_mem.catalogue import (
    PAD_NBYTES,
    PAGE_HEADER_NBYTES,
    Codec,
    allocate,
    encode,
    pack_entry,
)
from tiered_mem.environment import Environment, WriterLock, named_errors
from tiered_mem.errors import (
    ConfigError,
    StoreBusyError,
    StoreError,
    StoreReadOnlyError,
)
from tiered_mem.keys import BlockKey
from tiered_mem.payload_file import Batch, PayloadFile, extent_of
from tiered_mem.snapshot import RECORD_PREFIX, Snapshot, pack_key, verify

__all__ = ["Snapshot", "Store", "Transaction", "allocate"]

_METADATA_KEY = b"metadata"
_PAGE_HEADER = struct.Struct("<QHHI")  # page number, -, flags, number of overflow pages
_OVERFLOW_FLAG = 0x04
_LEAST_CATALOGUE_NBYTES = 512 << 10
_PAGES_OF_ENTRY = 4  # of the catalogue's tree, at most: its leaf, what that splits into, and above
_MAX_NBYTES = 0xFFFFFFFF - (16 << 20)  # LMDB's limit, less the pad and what zstd may add


class Store:
    """An open store. Safe to share between threads; a forked child must not use it."""

    def __init__(
        self,
        environment: Environment,
        writer_lock: WriterLock | None,
        payload_file: PayloadFile | None = None,
    ) -> None:
        self._environment = environment
        self._writer_lock = writer_lock
        self._payload_file = payload_file
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
        durable: bool = True,
        payload_file: bool = False,
    ) -> Store:
        """Open the store in directory `path`; mode "w" creates it if there is none.

        Any number of processes may read a store while one writes it. `capacity` limits the bytes of
        its file (default: what the disk has free). Within a process, open for writing first:
        a store that is open for reading can't be opened for writing as well. One that isn't
        `durable` doesn't wait for the disk: for what is of no use after this process, such as the
        blocks of a running model. With `payload_file`, payloads can be written past LMDB, to a file
        of their own: a part of `capacity` then is the catalogue's.

        Raises `StoreMissingError`, `StoreError` (truncated, not ours), `StoreMismatchError`
        (another version), `StoreBusyError` (another writer), `StoreReadOnlyError`,
        `StoreFullError`.
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
            lmdb_nbytes = _catalogue_share(capacity) if payload_file else capacity
            environment = Environment.create(directory, lmdb_nbytes, durable=durable)
        except BaseException:
            writer_lock.release()
            raise
        store = cls(environment, writer_lock)
        if payload_file:
            try:
                left = None if capacity is None else capacity - environment.map_nbytes
                store._payload_file = PayloadFile(environment, left)
            except BaseException:
                store.close()
                raise
        return store

    @property
    def path(self) -> Path:
        return self._environment.directory

    @property
    def direct(self) -> bool:
        """False where the filesystem has no O_DIRECT and reads go through the page cache."""
        return bool(self._open_environment().file.direct)

    @property
    def payload_file(self) -> PayloadFile:
        """Where payloads are written past LMDB. Raises `StoreReadOnlyError` if not opened so."""
        if self._payload_file is None:
            raise StoreReadOnlyError(f"{self.path} isn't open for writing to a file of payloads")
        return self._payload_file

    @property
    def catalogue_full(self) -> bool:
        """Whether so much of LMDB's file is in use that a transaction may soon find no room.

        What a transaction changes it writes anew, and gives the old pages back two later.
        """
        env = self._open_environment()
        return env.used_nbytes() * 3 > env.map_nbytes

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
            return Transaction(env, self._transaction_lock.release, self._payload_file)
        except BaseException:
            self._transaction_lock.release()
            raise

    def snapshot(self) -> Snapshot:
        """Begin a read transaction: the store as of now, for as long as it is open."""
        snapshot = Snapshot(self._open_environment(), self._snapshots.discard)
        self._snapshots.add(snapshot)
        return snapshot

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[BlockKey]:
        """Read every block and return the keys of those that are damaged or can't be read.

        `progress` is called with (bytes done, bytes in all) after every block.
        """
        with self.snapshot() as snapshot:
            return verify(snapshot, progress)

    def close(self) -> None:
        """End every snapshot and release the store. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        for snapshot in list(self._snapshots):
            snapshot.close()
        if self._payload_file is not None:
            self._payload_file.close()
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

    def __init__(
        self,
        environment: Environment,
        on_end: Callable[[], None],
        payload_file: PayloadFile | None = None,
    ) -> None:
        self._environment = environment
        self._on_end = on_end
        self._payload_file = payload_file
        self._freed: list[tuple[int, int]] = []  # (offset, bytes) in the file of payloads
        with named_errors(environment.directory):
            self._first_new_page = environment.lmdb.info()["last_pgno"] + 1
            self._txn = environment.lmdb.begin(write=True, buffers=True)
        self._generation: int = self._txn.id()
        self._whole = True
        self._num_pages = 1024  # upper bound of pages this transaction may take: see _extend_file

    def put(self, key: BlockKey, data: Any, *, codec: str = "none", itemsize: int = 1) -> None:
        """Write a block, replacing the one it had.

        `data` is any C-contiguous buffer. Codec "zstd" is lossless; `itemsize` is the size in bytes
        of its elements, of which 2 (bfloat16, float16) lets zstd see their byte planes.
        """
        if key.space != 0:
            raise ConfigError(f"{key} is of space {key.space}: keys of a store have space 0")
        packed = pack_key(key)
        chosen = Codec.choose(codec, itemsize)
        nbytes = memoryview(data).nbytes
        if nbytes > _MAX_NBYTES:
            raise StoreError(f"{key} has {nbytes} bytes: LMDB holds less than 4 GiB in one value")
        value, table = encode(data, chosen)
        with self._write():
            self._count_pages(value.nbytes)
            self._free_extent(packed)
            self._txn.put(packed, value.data, db=self._environment.payload)
            offset = self._place(packed, value.nbytes) + PAD_NBYTES
            entry = pack_entry(
                packed,
                chosen,
                nbytes=nbytes,
                generation=self._generation,
                offset=offset,
                table=table,
            )
            self._txn.put(packed, entry, db=self._environment.catalogue)

    def put_written(self, batch: Batch) -> None:
        """Enter the blocks of a batch that has been written. Then call its `keep`.

        Raises `StoreError` if there is such a block already.
        """
        entries = sorted(batch.entries)
        with self._write():
            for _, entry in entries:
                self._num_pages += self._pages_of(len(entry)) + _PAGES_OF_ENTRY
            cursor = self._txn.cursor(db=self._environment.catalogue)
            num_put, num_added = cursor.putmulti(entries, overwrite=False)
            if num_added != num_put:
                raise StoreError(f"{self._environment.directory} has blocks of these keys already")

    def delete(self, key: BlockKey) -> bool:
        """Remove a block. Returns whether there was one."""
        packed = pack_key(key)
        with self._write():
            self._count_pages(0)
            self._free_extent(packed)
            self._txn.delete(packed, db=self._environment.payload)
            return bool(self._txn.delete(packed, db=self._environment.catalogue))

    def set_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace the store's metadata (JSON types only)."""
        packed = json.dumps(metadata, sort_keys=True, allow_nan=False).encode()
        with self._write():
            self._count_pages(len(packed))
            self._txn.put(_METADATA_KEY, packed, db=self._environment.meta)

    def put_record(self, name: bytes, value: bytes) -> None:
        """Write a small record, which commits with the blocks it describes."""
        with self._write():
            self._count_pages(len(value))
            self._txn.put(RECORD_PREFIX + name, value, db=self._environment.meta)

    def delete_record(self, name: bytes) -> None:
        """Remove a record, if there is one."""
        with self._write():
            self._count_pages(0)
            self._txn.delete(RECORD_PREFIX + name, db=self._environment.meta)

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
                    self._commit()
        finally:
            self._txn.abort()  # does nothing after a commit
            self._on_end()

    @contextmanager
    def _write(self) -> Iterator[None]:
        # A payload without its entry, or an entry of a payload that is gone, must not commit, even
        # if the caller swallows the error that came between the two.
        whole, self._whole = self._whole, False
        with named_errors(self._environment.directory):
            yield
        self._whole = whole

    def _commit(self) -> None:
        if not self._whole:
            raise StoreError(
                f"a write to {self._environment.directory} failed: its transaction is undone"
            )
        self._extend_file()
        self._txn.commit()
        if self._payload_file is not None:
            self._payload_file.free(self._freed, self._generation)

    def _free_extent(self, packed: bytes) -> None:
        if self._payload_file is None:
            return
        entry = self._txn.get(packed, db=self._environment.catalogue)
        extent = None if entry is None else extent_of(self._environment, packed, entry)
        if extent is not None:
            self._freed.append(extent)

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


def _catalogue_share(capacity: int | None) -> int | None:
    """Return the part of a store's capacity that is LMDB's if payloads lie in another file.

    A sixteenth is enough for blocks of one page; a very large or small store needs less or more.
    """
    if capacity is None:
        return None
    return min(max(capacity // 16, _LEAST_CATALOGUE_NBYTES), capacity // 2, 1 << 30)

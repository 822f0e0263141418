"""Reading a store as it was at one moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tiered_mem import _core
from tiered_mem.catalogue import allocate
from tiered_mem.environment import Environment, named_errors
from tiered_mem.errors import ChecksumError, StoreError, TransferError
from tiered_mem.keys import BlockKey, KeyArray

RECORD_PREFIX = b"record:"
"""Begins the names of records in `meta`, so that stores without any stay as they are."""


class Snapshot:
    """The store at one moment. Places stay right exactly as long as it is open. Thread-safe."""

    def __init__(self, environment: Environment, on_end: Callable[[Snapshot], None]) -> None:
        self._environment = environment
        self._on_end = on_end
        self._lock = threading.Lock()  # LMDB wants one thread at a time in a transaction
        self._named_errors = named_errors(environment.directory)
        self._txn = environment.begin_read()
        self._closed = False

    def keys(self) -> KeyArray:
        """Return the packed keys of all blocks in ascending order, uint64."""
        with self._lock, self._named_errors:
            cursor = self._txn.cursor(db=self._environment.catalogue)
            packed = b"".join(bytes(key) for key in cursor.iternext(keys=True, values=False))
        return np.frombuffer(packed, ">u8").astype(np.uint64)

    def __len__(self) -> int:
        with self._lock, self._named_errors:
            return int(self._txn.stat(self._environment.catalogue)["entries"])

    def __contains__(self, key: BlockKey | int) -> bool:
        with self._lock, self._named_errors:
            return self._txn.get(pack_key(key), db=self._environment.catalogue) is not None

    def records(self) -> dict[bytes, bytes]:
        """Return the records by name: see `Transaction.put_record`."""
        found: dict[bytes, bytes] = {}
        with self._lock, self._named_errors:
            cursor = self._txn.cursor(db=self._environment.meta)
            cursor.set_range(RECORD_PREFIX)
            for name, value in cursor:
                if not bytes(name).startswith(RECORD_PREFIX):
                    break
                found[bytes(name)[len(RECORD_PREFIX) :]] = bytes(value)
        return found

    def nbytes(self, key: BlockKey | int) -> int:
        """Return a block's raw size. Raises as `extent`."""
        return self.extent(key).nbytes

    def extent(self, key: BlockKey | int) -> _core.Extent:
        """Return where a block's bytes lie, for the transfer engine. Keep the snapshot open.

        Raises `StoreError` if there is no such block, `ChecksumError` if its entry is damaged.
        """
        packed = pack_key(key)
        with self._lock, self._named_errors:
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
            return _core.parse_entry(self._environment.file_of(entry), packed, entry)
        except ChecksumError as error:
            raise ChecksumError(f"{_name(key)}: {error}") from error


def verify(snapshot: Snapshot, progress: Callable[[int, int], None] | None) -> list[BlockKey]:
    """Read every block; return the keys of the damaged: see `Store.verify`."""
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


def pack_key(key: BlockKey | int) -> bytes:
    """Return the bytes that name a block in the databases."""
    packed = key.pack() if isinstance(key, BlockKey) else int(key)
    return packed.to_bytes(8, "big")  # so that LMDB sorts keys as numbers


def _name(key: BlockKey | int) -> str:
    return str(key) if isinstance(key, BlockKey) else str(BlockKey.unpack(int(key)))

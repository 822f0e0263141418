"""The LMDB environment under a store: opening and sharing it, locks, and errors by name."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lmdb

from tiered_mem import _core
from tiered_mem.catalogue import lies_apart
from tiered_mem.errors import (
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
    StoreMissingError,
    StoreReadOnlyError,
)

FORMAT_VERSION = 2
_FIRST_VERSION = 1  # all payloads in LMDB's file; reads as it is

_DATA, _LOCK, _WRITER_LOCK, _PAYLOAD = "data.mdb", "lock.mdb", "writer.lock", "payload.bin"
FILE_NAMES = (_DATA, _LOCK, _WRITER_LOCK, _PAYLOAD)
"""All that a store's directory holds."""
_DATABASES = (b"catalogue", b"payload", b"meta")
_FORMAT_KEY = b"format"
_FORMAT = struct.Struct("<I")
_MAX_READERS = 1024
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class WriterLock:
    """Held by the one process that may write. The kernel drops it when that process dies.

    LMDB's own lock would make a second writer wait; this one lets it fail at once.
    """

    def __init__(self, directory: Path) -> None:
        """Make `directory` if need be and lock it. Raises `StoreBusyError`."""
        with named_errors(directory):
            _prepare_directory(directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(directory / _WRITER_LOCK, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise StoreBusyError(
                f"{directory} is open for writing already: close it there first"
            ) from None

    def release(self) -> None:
        os.close(self._fd)


class Environment:
    """An LMDB environment, which a process may open only once: every `Store` on it shares it.

    `meta`, `catalogue` and `payload` are its databases, `file` its data file to read from.
    """

    # Locks are re-entrant: the garbage collector may close a store in the middle of anything.
    _shared: ClassVar[dict[tuple[int, int], Environment]] = {}
    _shared_lock = threading.RLock()

    def __init__(
        self, directory: Path, *, map_nbytes: int, writable: bool, durable: bool = True
    ) -> None:
        self.directory = directory
        self.data_path = directory / _DATA
        self.payload_path = directory / _PAYLOAD
        self._payload_file: _core.File | None = None
        self._users = 0
        self._num_readers = 0
        self._readers_lock = threading.RLock()
        with named_errors(directory):
            self.lmdb = lmdb.open(
                str(directory),
                map_size=map_nbytes,
                readonly=not writable,
                create=writable,
                mode=0o600,
                max_dbs=3,
                max_readers=_MAX_READERS,
                sync=durable,
                readahead=False,  # only the catalogue is read through the map
            )
        try:
            self.page_nbytes: int = self.lmdb.stat()["psize"]
            self._refuse_truncated()
            with named_errors(directory):
                if writable:
                    self._create_databases()
                self._open_databases()
                self.lmdb.reader_check()  # frees what killed readers held
            self.file = _core.File(str(self.data_path))
            status = os.stat(self.data_path)
            self._identity = status.st_dev, status.st_ino
        except BaseException:
            self.lmdb.close()
            raise

    @classmethod
    def open(cls, directory: Path) -> Environment:
        """Return the environment of an existing store, to read."""
        with cls._shared_lock:
            with named_errors(directory):
                identity = _identity(directory)
            if identity is None:
                raise StoreMissingError(f"no store at {directory}: make one with `tiered-mem pack`")
            if os.stat(directory / _DATA).st_size == 0:  # LMDB would call it a bad descriptor
                raise _unfinished(directory)
            if identity not in cls._shared:
                return cls(directory, map_nbytes=0, writable=False)._share()
            cls._shared[identity]._users += 1
            return cls._shared[identity]

    @classmethod
    def create(cls, directory: Path, capacity: int | None, *, durable: bool = True) -> Environment:
        """Return the environment of a store to write, made if need be. Hold its `WriterLock`."""
        with cls._shared_lock:
            if _identity(directory) in cls._shared:
                raise StoreBusyError(f"{directory} is open in this process already: close it first")
            with named_errors(directory):
                map_nbytes = _map_nbytes(directory, capacity)
            environment = cls(directory, map_nbytes=map_nbytes, writable=True, durable=durable)
            return environment._share()

    def _share(self) -> Environment:
        self._shared[self._identity] = self
        self._users = 1
        self._announce()
        return self

    def release(self) -> None:
        """Give up one use; the last one closes the environment and its transactions."""
        with self._shared_lock:
            self._users -= 1
            if self._users == 0:
                del self._shared[self._identity]
                self.lmdb.close()
                del self.file, self._payload_file  # open, they keep a deleted store's space

    def file_of(self, entry: Any) -> _core.File:
        """Return the file that an entry's payload lies in. Raises `TransferError` if it's gone."""
        if not lies_apart(entry):
            return self.file
        if self._payload_file is None:  # it comes with the first payload
            self._payload_file = _core.File(str(self.payload_path))
        return self._payload_file

    def payload_nbytes(self) -> int:
        """Return the size of the file of payloads, 0 if there is none."""
        try:
            return os.stat(self.payload_path).st_size
        except FileNotFoundError:
            return 0

    @property
    def map_nbytes(self) -> int:
        """What limits LMDB's file."""
        return int(self.lmdb.info()["map_size"])

    def used_nbytes(self) -> int:
        """Return the bytes of the pages that hold the catalogue, metadata and records."""
        txn = self.begin_read()
        try:
            stats = [txn.stat(db) for db in (self.catalogue, self.meta)]
        finally:
            self.end_read(txn)
        kinds = ("leaf_pages", "branch_pages", "overflow_pages")
        num_pages: int = sum(stat[kind] for stat in stats for kind in kinds)
        return self.page_nbytes * num_pages

    def last_transaction(self) -> int:
        """Return the number of the transaction that was committed last."""
        return int(self.lmdb.info()["last_txnid"])

    def oldest_reader(self) -> int | None:
        """Return the oldest snapshot of any process, by its transaction; None if there are none."""
        self.lmdb.reader_check()  # forgets those that were killed
        rows = self.lmdb.readers().splitlines()[1:]
        found = [row.split()[-1] for row in rows]  # process, thread, transaction or "-"
        return min((int(number) for number in found if number.isdigit()), default=None)

    def begin_read(self) -> Any:
        """Begin a read transaction; end it with `end_read`."""
        with self._readers_lock, named_errors(self.directory):
            try:
                txn = self.lmdb.begin(buffers=True)
            except lmdb.MapResizedError:
                # Another process opened the store with a larger capacity. Moving our map to match
                # would pull it from under the transactions that are open.
                if self._num_readers > 0:
                    raise StoreError(
                        f"{self.directory} has outgrown its map: close its snapshots and try again"
                    ) from None
                self.lmdb.set_mapsize(0)
                txn = self.lmdb.begin(buffers=True)
            self._num_readers += 1
            return txn

    def end_read(self, txn: Any) -> None:
        with self._readers_lock:
            txn.abort()
            self._num_readers -= 1

    def _refuse_truncated(self) -> None:
        # Touching the map behind the file's end would kill the process with SIGBUS. Opening and
        # info() don't; every writer keeps the file at least this long (Transaction._extend_file).
        expected = (self.lmdb.info()["last_pgno"] + 1) * self.page_nbytes
        actual = os.stat(self.data_path).st_size
        if actual < expected:
            raise StoreError(
                f"{self.data_path} is truncated: {actual} bytes of at least {expected}. "
                "Delete the store and pack it again"
            )

    def _create_databases(self) -> None:
        with self.lmdb.begin(write=True) as txn:
            if txn.stat()["entries"] == 0:
                _, _, meta = (self.lmdb.open_db(name, txn=txn) for name in _DATABASES)
                txn.put(_FORMAT_KEY, _FORMAT.pack(FORMAT_VERSION), db=meta)

    def _open_databases(self) -> None:
        try:
            self.catalogue, self.payload, self.meta = (
                self.lmdb.open_db(name, create=False) for name in _DATABASES
            )
        except lmdb.NotFoundError:
            if self.lmdb.stat()["entries"] == 0:
                raise _unfinished(self.directory) from None
            raise StoreError(
                f"{self.directory} holds an LMDB database that isn't a store of tiered-mem"
            ) from None
        with self.lmdb.begin(db=self.meta) as txn:
            version = _FORMAT.unpack(txn.get(_FORMAT_KEY, bytes(_FORMAT.size)))[0]
        if version not in (_FIRST_VERSION, FORMAT_VERSION):
            raise StoreMismatchError(
                f"{self.directory} has store format {version}, this version of tiered-mem reads "
                f"{FORMAT_VERSION}: pack it again"
            )

    def _announce(self) -> None:
        if not self.file.direct:
            warnings.warn(
                f"{self.directory} lies on a filesystem without O_DIRECT: blocks are read through "
                "the page cache, at the cost of a copy and of memory beside the budgets",
                RuntimeWarning,
                stacklevel=5,
            )
        if not _core.async_reads_available():
            warnings.warn(
                "Linux native AIO isn't available here: a reader waits for each chunk in turn, "
                "which lowers the bandwidth of a single reader",
                RuntimeWarning,
                stacklevel=5,
            )


class named_errors:
    """Turns errors of LMDB and the system into those of `tiered_mem.errors`.

    `written_nbytes` is what a failed commit may have tried to write: LMDB reports a write cut short
    by a full disk as EIO, which only the space left tells from a broken one.
    """

    # A class: every lookup enters it, and contextlib's generators cost microseconds.
    __slots__ = ("_directory", "_written_nbytes")

    def __init__(self, directory: Path, written_nbytes: int = 0) -> None:
        self._directory = directory
        self._written_nbytes = written_nbytes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, lmdb.Error | OSError):
            raise _named(error, self._directory, self._written_nbytes) from error


def _named(error: Any, directory: Path, written_nbytes: int) -> StoreError:
    if isinstance(error, lmdb.MapFullError):
        return StoreFullError(
            f"{directory} has reached its capacity: open it with a larger one, or delete blocks"
        )
    if isinstance(error, lmdb.VersionMismatchError):
        return StoreMismatchError(f"{directory} is of another LMDB version: {error}")
    code = error.errno if isinstance(error, OSError) else error.code
    if code in _FULL or (code == errno.EIO and _free_nbytes(directory) < written_nbytes):
        return StoreFullError(f"the disk under {directory} is full: {error}")
    if code in _READ_ONLY or isinstance(error, lmdb.ReadonlyError):
        return StoreReadOnlyError(f"{directory} doesn't allow this access: {error}")
    return StoreError(f"{directory}: {error}")


def _unfinished(directory: Path) -> StoreMissingError:
    return StoreMissingError(
        f"{directory / _DATA} is empty, as when the making of a store was cut short: pack into it "
        "again with `tiered-mem pack`"
    )


def _prepare_directory(directory: Path) -> None:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    names = set(os.listdir(directory))
    if names and _DATA not in names and not names <= {_LOCK, _WRITER_LOCK}:
        raise StoreError(f"{directory} is not empty and holds no store: name another directory")


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(directory / _DATA)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _map_nbytes(directory: Path, capacity: int | None) -> int:
    """Return the size of the map, which is what limits the file."""
    if capacity is None:
        data = directory / _DATA
        used = os.stat(data).st_blocks * 512 if data.exists() else 0
        capacity = used + _free_nbytes(directory)
    pages = max(capacity // mmap.PAGESIZE, 16)  # LMDB can't start with less
    return pages * mmap.PAGESIZE


def _free_nbytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize

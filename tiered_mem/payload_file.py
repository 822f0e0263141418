"""Payloads in a file of their own, written past the page cache before their records commit.

LMDB writes its values through the page cache and then waits for it, at a fraction of what the disk
takes. Nor can others write at the offsets of its values: a transaction's pages are copies in memory
that its commit writes over whatever is there, and with a writable map the kernel may write them at
any time. So payloads that come in bulk lie in `payload.bin` beside LMDB's file.

Which bytes of it are in use stands in the catalogue alone: those that a committed entry names.
There is no free list that a crash could put at odds with it. The one writer a store has at a time
(`WriterLock`) finds the free extents when it opens the store, and keeps them in memory. A batch
takes extents, writes them by O_DIRECT, has the disk keep them (fdatasync), and only then commits
its entries with all that belongs to them in one LMDB transaction. Before that commit nothing names
the bytes; after it the disk has them.

What a transaction frees is used again when no reader has a snapshot from before it, in this process
or another: LMDB's own rule for its pages, from LMDB's own table of readers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tiered_mem import _core
from tiered_mem.catalogue import (
    ALIGNMENT,
    Bytes,
    Codec,
    as_bytes,
    lies_apart,
    pack_entry,
    plain_table,
    round_up,
)
from tiered_mem.environment import Environment, named_errors
from tiered_mem.errors import ChecksumError, StoreFullError
from tiered_mem.free_extents import ENDLESS, FreeExtents
from tiered_mem.keys import BlockKey
from tiered_mem.snapshot import pack_key

_RUN_NBYTES = 4 << 20
_LENT_NBYTES = 16 << 20  # as many of these as keep a disk busy


class Lent(Protocol):
    """Payloads in memory of their owner, aligned, which stay as they are until `give_back`."""

    @property
    def blocks(self) -> Sequence[Bytes]: ...

    def give_back(self) -> None: ...


class Owner(Protocol):
    """Whose payloads are written. Both are asked for several, of which only they know the names."""

    def lend(self, names: Sequence[Any]) -> Lent | None:
        """Return them, or None: then they're copied."""

    def copy(self, names: Sequence[Any], outs: Sequence[Bytes]) -> None:
        """Copy each to memory as large. Nothing that was lent is out then."""


@dataclass(frozen=True)
class Source:
    """A payload of `nbytes` bytes, what `owner` has under `name`."""

    nbytes: int
    owner: Owner
    name: Any

    @classmethod
    def of(cls, data: Any) -> Source:
        """Return `data` itself, or that of a C-contiguous buffer. Raises `ConfigError`."""
        if isinstance(data, cls):
            return data
        raw = as_bytes(data)
        return cls(raw.nbytes, _BUFFERS, raw)


class _Buffers:
    """The owner of buffers, which are their own names."""

    def lend(self, names: Sequence[Any]) -> None:
        return None

    def copy(self, names: Sequence[Any], outs: Sequence[Bytes]) -> None:
        for raw, out in zip(names, outs, strict=True):
            np.copyto(out, raw)


_BUFFERS = _Buffers()


class PayloadFile:
    """The writer's side of `payload.bin`. One thread at a time but for `Batch.write`."""

    def __init__(self, environment: Environment, limit: int | None) -> None:
        """Find what is free. `limit` is in bytes; without one, the disk has the say."""
        self._environment = environment
        limit = ENDLESS if limit is None else max(0, limit)
        self._free = FreeExtents(_used(environment), limit)
        self._writer: _core.FileWriter | None = None
        self._disk_full = False
        # Snapshots from before this process came may have what has been freed since.
        last = environment.last_transaction()
        size = environment.payload_nbytes()
        self._freed = [(last, *extent) for extent in self._free.take_before(size)]

    @property
    def directory(self) -> Path:
        return self._environment.directory

    @property
    def writer(self) -> _core.FileWriter:
        """Makes the file at its first use: not in a store that turns out to be another's."""
        if self._writer is None:
            with named_errors(self.directory):
                self._writer = _core.FileWriter(str(self._environment.payload_path))
        return self._writer

    def begin(self, payloads: Sequence[tuple[BlockKey, Source]]) -> Batch:
        """Take room for a batch. Raises `StoreFullError`; then none is taken."""
        self._reclaim()
        extents: list[tuple[int, int]] = []
        try:
            for _, source in payloads:
                nbytes = round_up(source.nbytes, ALIGNMENT)
                offset = self._free.take(nbytes)
                if offset is None:
                    self._disk_full = False
                    raise StoreFullError(self._no_room())
                extents.append((offset, nbytes))
            self._grow(max((sum(extent) for extent in extents), default=0))
        except BaseException:
            self.give_back(extents)
            raise
        generation = self._environment.last_transaction() + 1
        return Batch(self, payloads, extents, generation)

    def num_missing(self, payloads: Sequence[tuple[BlockKey, Source]]) -> int:
        """Return how many bytes more would have to be free for these, which found no room.

        Positive even where the gaps add up. A full disk is a limit, too: what the file has now.
        """
        nbytes = sum(round_up(source.nbytes, ALIGNMENT) for _, source in payloads)
        end = self._environment.payload_nbytes() if self._disk_full else ENDLESS
        return max(nbytes - self._free.nbytes_before(end), nbytes // 8, ALIGNMENT)

    @property
    def read_by_others(self) -> bool:
        """Whether there are freed bytes that wait for readers of older snapshots."""
        return bool(self._freed)

    def free(self, extents: Iterable[tuple[int, int]], transaction: int) -> None:
        """Take back (offset, bytes) that a committed transaction freed, for when nobody reads."""
        self._freed += [(transaction, offset, nbytes) for offset, nbytes in extents]

    def give_back(self, extents: Iterable[tuple[int, int]]) -> None:
        """Take back (offset, bytes) that no entry ever named."""
        for offset, nbytes in extents:
            self._free.give(offset, nbytes)
        self.trim()

    def trim(self) -> None:
        """Give what is free at the file's end back to the disk."""
        self._reclaim()
        with named_errors(self.directory):
            if self._free.tail < self._environment.payload_nbytes():
                self.writer.truncate(self._free.tail)

    def close(self) -> None:
        self._writer = None

    def _grow(self, end: int) -> None:
        nbytes = self._environment.payload_nbytes()
        self._disk_full = end > nbytes  # until it proves otherwise
        if end > nbytes:
            with named_errors(self.directory):
                self.writer.reserve(nbytes, end - nbytes)
        self._disk_full = False

    def _reclaim(self) -> None:
        if not self._freed:
            return
        oldest = self._environment.oldest_reader()
        late = []
        for transaction, offset, nbytes in self._freed:
            if oldest is None or oldest >= transaction:
                self._free.give(offset, nbytes)
            else:
                late.append((transaction, offset, nbytes))
        self._freed = late

    def _no_room(self) -> str:
        if self.read_by_others:
            return (
                f"{self.directory} has no room but what others still read: try "
                "again when they are done, or give it a larger capacity"
            )
        return f"{self.directory} has no room beside what is in use: give it a larger capacity"


class Batch:
    """Payloads for which there is room, on their way into the file.

    Once `write` is through, `Transaction.put_written` names them; then call `keep`. Otherwise call
    `abort`.
    """

    def __init__(
        self,
        file: PayloadFile,
        payloads: Sequence[tuple[BlockKey, Source]],
        extents: list[tuple[int, int]],
        generation: int,
    ) -> None:
        self._file = file
        self._payloads = payloads
        self._extents = extents
        self._generation = generation
        self._lent: deque[tuple[int, Lent]] = deque()
        self.entries: list[tuple[bytes, bytes]] = []

    def write(self) -> None:
        """Make the payloads and write them, until the disk has them. One batch at a time.

        Raises `StoreFullError`, `StoreError`, and what their sources raise.
        """
        writer = self._file.writer
        with named_errors(self._file.directory):
            try:
                for first, last in self._runs():
                    self._write_run(writer, first, last)
                self._give_back(writer)
                writer.flush()
            except BaseException:
                writer.discard()
                self._give_back(writer)
                raise

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield [first, last) of payloads to be made at once: one owner's, not too much."""
        first, nbytes = 0, 0
        for i, (_, source) in enumerate(self._payloads):
            nbytes += source.nbytes
            alike = source.owner is self._payloads[first][1].owner
            if i > first and (nbytes > _RUN_NBYTES or not alike):
                yield first, i
                first, nbytes = i, source.nbytes
        if self._payloads:
            yield first, len(self._payloads)

    def _write_run(self, writer: _core.FileWriter, first: int, last: int) -> None:
        sources = [source for _, source in self._payloads[first:last]]
        offsets = [offset for offset, _ in self._extents[first:last]]
        owner, names = sources[0].owner, [source.name for source in sources]
        lent = owner.lend(names)
        if lent is None:
            self._give_back(writer)
            blocks: Sequence[Bytes] = writer.take([source.nbytes for source in sources])
            owner.copy(names, blocks)
        else:
            blocks = lent.blocks
            try:
                self._lent.append((writer.write_from(blocks, offsets), lent))
            except BaseException:
                lent.give_back()
                raise
        for (key, _), block, offset in zip(
            self._payloads[first:last], blocks, offsets, strict=True
        ):
            self.entries.append(self._entry(pack_key(key), block, offset))
        if lent is None:
            writer.write(offsets)
        self._give_back(writer, _LENT_NBYTES)

    def _give_back(self, writer: _core.FileWriter, keep: int = 0) -> None:
        """Give back what was lent, once it is written, but the last `keep` bytes."""
        while sum(block.nbytes for _, lent in self._lent for block in lent.blocks) > keep:
            number, lent = self._lent.popleft()
            try:
                writer.wait(number)
            finally:
                lent.give_back()

    def _entry(self, packed: bytes, raw: Bytes, offset: int) -> tuple[bytes, bytes]:
        entry = pack_entry(
            packed,
            Codec.NONE,
            nbytes=raw.nbytes,
            generation=self._generation,
            offset=offset,
            table=plain_table(raw),
            apart=True,
        )
        return packed, entry

    def keep(self) -> None:
        """Its entries are committed: the extents are the store's."""
        self._extents = []

    def abort(self) -> None:
        """Give its extents back, unless they were kept."""
        extents, self._extents = self._extents, []
        if extents:
            self._file.give_back(extents)


def extent_of(environment: Environment, packed: bytes, entry: Any) -> tuple[int, int] | None:
    """Return (offset, bytes) of what an entry has in `payload.bin`; None if that is nothing."""
    if not lies_apart(entry):
        return None
    try:
        extent = _core.parse_entry(environment.file, packed, entry)
    except ChecksumError:  # its bytes are free when the store is opened next
        return None
    return extent.offset, round_up(extent.stored_nbytes, ALIGNMENT)


def _used(environment: Environment) -> list[tuple[int, int]]:
    """Return what the catalogue names of `payload.bin`: (offset, bytes)."""
    txn = environment.begin_read()
    try:
        cursor = txn.cursor(db=environment.catalogue)
        extents = [extent_of(environment, bytes(key), entry) for key, entry in cursor]
    finally:
        environment.end_read(txn)
    return [extent for extent in extents if extent is not None]

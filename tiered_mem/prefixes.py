"""KV prefixes that survive a restart: chains of sealed groups of tokens in a store.

A group's payloads are written first, past the page cache (see `payload_file`); its record commits
in one transaction with the entries that name them. Groups are named by a hash chain
over their token ids, as vLLM's prefix caching does, started from the model and the layout.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

from tiered_mem import _core
from tiered_mem.catalogue import Bytes, allocate
from tiered_mem.errors import (
    ChecksumError,
    ConfigError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
    TransferError,
)
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.payload_file import Batch, Source
from tiered_mem.prefix_index import (
    STATE_LAYER,
    Group,
    PrefixIndex,
    Record,
    TokenIds,
    group_hash,
    root_hash,
)
from tiered_mem.store import Store, Transaction

__all__ = ["Group", "PrefixStore"]

_FORMAT = "kv prefixes 2"
_FORMER = "kv prefixes 1"  # payloads as values of LMDB


class PrefixStore:
    """An open store of prefixes. One thread at a time."""

    def __init__(self, store: Store, *, root: bytes | None, block_tokens: int = 0) -> None:
        """Take over `store`. Without a `root` it can be looked after, but not matched or saved."""
        self.store = store
        self.root = root or b""
        self.block_tokens = block_tokens
        self.num_damaged = 0
        self._held: dict[object, list[bytes]] = {}
        self._touched: set[bytes] = set()
        self._load()

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        fingerprint: str,
        layout: dict[str, Any],
        capacity: int | None = None,
        max_age: float | None = None,
    ) -> PrefixStore:
        """Open the prefixes of one model in `directory` to match and save, making it if need be.

        `layout` (JSON types) has `block_tokens`, the tokens of a group, and all else that gives
        the bytes their meaning. `capacity` limits the file's bytes; what wasn't used for `max_age`
        seconds is removed. Raises `ConfigError`, `StoreMismatchError` if the directory holds other
        blocks, and as `Store.open`.
        """
        block_tokens = layout.get("block_tokens")
        if not isinstance(block_tokens, int) or block_tokens <= 0:
            raise ConfigError(f"block_tokens of a KV layout is a positive number: {block_tokens!r}")
        root = root_hash(fingerprint, layout)
        store = Store.open(directory, mode="w", capacity=capacity, payload_file=True)
        try:
            metadata = _check_kind(store)
            models = metadata.get("models", {})
            if root.hex() not in models:
                models[root.hex()] = {"fingerprint": fingerprint, "layout": layout}
                store.set_metadata({"format": _FORMAT, "models": models})
            prefixes = cls(store, root=root, block_tokens=block_tokens)
            prefixes.gc(max_age=max_age)
            return prefixes
        except BaseException:
            store.close()
            raise

    @classmethod
    def inspect(
        cls, directory: str | os.PathLike[str], *, mode: Literal["r", "w"] = "r"
    ) -> PrefixStore:
        """Open the prefixes of all models in an existing store. Raises as `open`."""
        Store.open(directory).close()  # mode "w" would make one
        store = Store.open(directory, mode=mode, payload_file=mode == "w")
        try:
            if not _check_kind(store):
                raise StoreMismatchError(f"{store.path} holds no KV prefixes: name another store")
            return cls(store, root=None)
        except BaseException:
            store.close()
            raise

    def _load(self) -> None:
        self.index = PrefixIndex()
        self.broken: list[bytes] = []
        with self.store.snapshot() as snapshot:
            for name, packed in snapshot.records().items():
                try:
                    self.index.add(Record.unpack(name, packed))
                except ChecksumError:
                    self.broken.append(name)
            keys = [BlockKey.unpack(key) for key in snapshot.keys().tolist()]
        owned = {key for record in self.index.records.values() for key in record.keys}
        self.orphans = sorted(set(keys) - owned)
        self._missing = owned - set(keys)
        self._next_index = max((key.index for key in keys), default=-1) + 1

    def match(self, token_ids: TokenIds) -> list[Record]:
        """Return the records of the longest stored prefix, whole groups only, in order."""
        found: list[Record] = []
        parent, now = self.root, time.time()
        for end in range(self.block_tokens, len(token_ids) + 1, self.block_tokens):
            parent = group_hash(parent, token_ids[end - self.block_tokens : end])
            if parent not in self.index.records:
                break
            # Written with the next save: a match needs no transaction.
            record = replace(self.index.records[parent], last_used=now)
            self.index.records[parent] = record
            self._touched.add(parent)
            found.append(record)
        return found

    def save(
        self, groups: Sequence[Group], lock: AbstractContextManager[Any] | None = None
    ) -> list[Record]:
        """Write groups, parents before children, to be stored all at once; return their records.

        A group that is stored already isn't written again. With a `lock`, others may use the store
        while they hold it: it is held but while payloads are made and written. Raises `ConfigError`
        (wrong number of tokens, unknown parent), `StoreFullError`, `StoreError` (what they follow
        was removed meanwhile) and what their sources raise; then none of them is stored.
        """
        lock = lock or nullcontext()
        with lock:
            new = self._new_groups(groups)
            if not new:
                return [self.index.records[group.hash] for group in groups]
            keep = [name for group in groups for name in (group.hash, group.parent)]
            batch, records = self._begin(new, keep)
        try:
            batch.write()
            with lock:
                if self._new_groups(groups).keys() != new.keys():
                    raise StoreError(
                        f"what these groups follow was found damaged in {self.store.path} and "
                        "removed while they were written: save them all again"
                    )
                self._commit(batch, records, keep)
                return [self.index.records[group.hash] for group in groups]
        finally:
            with lock:
                batch.abort()

    def _new_groups(self, groups: Sequence[Group]) -> dict[bytes, Group]:
        new: dict[bytes, Group] = {}
        for group in groups:
            known = group.parent == self.root or group.parent in self.index.records
            if not known and group.parent not in new:
                raise ConfigError(f"no prefix {group.parent.hex()[:16]} to save a group after")
            if len(group.token_ids) != self.block_tokens:
                raise ConfigError(f"a group has {self.block_tokens} tokens: {len(group.token_ids)}")
            if group.hash not in self.index.records:
                new[group.hash] = group
        return new

    def _begin(
        self, new: Mapping[bytes, Group], keep: Sequence[bytes]
    ) -> tuple[Batch, list[Record]]:
        now, records, payloads = time.time(), [], []
        for index, (name, group) in enumerate(new.items(), self._next_index):
            record = Record(
                hash=name,
                parent=group.parent,
                root=self.root,
                index=index,
                num_tokens=len(group.token_ids),
                nbytes=group.nbytes,
                created=now,
                last_used=now,
                layers=tuple(layer for layer, _ in group.blocks),
                states=tuple(group.states),
            )
            records.append(record)
            payloads += group.payloads(index)
        self._next_index += len(records)
        return self._take_room(payloads, keep), records

    def _take_room(
        self, payloads: Sequence[tuple[BlockKey, Source]], keep: Sequence[bytes]
    ) -> Batch:
        file = self.store.payload_file
        if self.store.catalogue_full:
            self._evict(self.index.nbytes // 8, keep)
        while True:
            try:
                return file.begin(payloads)
            except StoreFullError:
                # In vain while others read what was freed, and for more than there is.
                missing = file.num_missing(payloads)
                if file.read_by_others or missing > self.index.nbytes:
                    raise
                if not self._evict(missing, keep):
                    raise

    def _commit(self, batch: Batch, records: Sequence[Record], keep: Sequence[bytes]) -> None:
        try:
            self._put(batch, records)
        except StoreFullError:
            # LMDB's, that is: the payloads have their room.
            if not self._evict(2 * sum(record.nbytes for record in records), keep):
                raise
            # LMDB reuses pages from the second transaction after the one that freed them.
            for _ in range(2):
                with self.store.transaction() as txn:
                    txn.set_metadata(self.store.metadata)
            self._put(batch, records)
        batch.keep()
        self._touched.clear()
        for record in records:
            self.index.add(record)

    def _put(self, batch: Batch, records: Sequence[Record]) -> None:
        with self.store.transaction() as txn:
            txn.put_written(batch)
            for record in records:
                txn.put_record(record.hash, record.pack())
            self._put_touched(txn)

    def _put_touched(self, txn: Transaction) -> None:
        for name in self._touched & self.index.records.keys():
            txn.put_record(name, self.index.records[name].pack())

    def _evict(self, nbytes: int, keep: Sequence[bytes] = ()) -> list[Record]:
        held = {name for names in list(self._held.values()) for name in names}
        victims = self.index.victims(nbytes, held, keep)
        self._remove(victims)
        return victims

    def _remove(self, records: Sequence[Record]) -> None:
        if not records:
            return
        with self.store.transaction() as txn:
            for record in records:
                for key in record.keys:
                    txn.delete(key)
                txn.delete_record(record.hash)
        for record in records:
            self.index.remove(record)

    @contextmanager
    def hold(self, records: Sequence[Record]) -> Iterator[None]:
        """Keep `records` from eviction while in use. May end in a finalizer, on any thread."""
        holder = object()
        self._held[holder] = [record.hash for record in records]
        try:
            yield
        finally:
            del self._held[holder]

    def places(self, records: Sequence[Record]) -> list[dict[BlockKey, _core.Extent]]:
        """Return where the payloads of each record lie, up to the first whose entry is damaged.

        That one is removed as by `damaged`. Places are good while the records are held: payloads
        don't move until they are removed. No snapshot is kept, which would keep LMDB from reusing
        what others free. What `damaged` removes all the same fails its checksum once overwritten.
        """
        found: list[dict[BlockKey, _core.Extent]] = []
        with self.store.snapshot() as snapshot:
            for record in records:
                try:
                    extents = snapshot.extents(record.keys)
                except (ChecksumError, TransferError):
                    break
                found.append(dict(zip(record.keys, extents, strict=True)))
        if len(found) < len(records):
            self.damaged(records[len(found)])
        return found

    def read_state(self, record: Record, state: int) -> Bytes:
        """Return state `state` of a group. Raises as `Snapshot.read`."""
        return self.read_layer(record, STATE_LAYER + state)

    def read_layer(self, record: Record, layer: int) -> Bytes:
        """Return one payload of a group. Raises as `Snapshot.read`."""
        key = BlockKey(Kind.KV, layer, record.index)
        with self.store.snapshot() as snapshot:
            out = allocate(snapshot.nbytes(key))
            snapshot.read(key, out)
        return out

    def damaged(self, record: Record) -> int:
        """Remove a damaged record and all that descend from it; return how many went."""
        gone = self.index.descendants(record.hash)
        self._remove(gone)
        self.num_damaged += len(gone)
        return len(gone)

    def gc(self, *, capacity: int | None = None, max_age: float | None = None) -> int:
        """Remove what is unreachable, older than `max_age` seconds, or beyond `capacity` bytes.

        Returns how many records went.
        """
        before = len(self.index.records)
        if self._missing:
            for record in list(self.index.records.values()):
                if not self._missing.isdisjoint(record.keys):
                    self.damaged(record)
        self._remove(self.index.headless())
        self._sweep()
        if max_age is not None:
            oldest = time.time() - max_age
            young = [n for n, r in self.index.records.items() if r.last_used >= oldest]
            self._evict(self.index.nbytes, young)
        if capacity is not None and self.index.nbytes > capacity:
            self._evict(self.index.nbytes - capacity)
        self.store.payload_file.trim()
        return before - len(self.index.records)

    def _sweep(self) -> None:
        """Remove payloads without a record, and records that can't be read."""
        if not self.orphans and not self.broken:
            return
        with self.store.transaction() as txn:
            for key in self.orphans:
                txn.delete(key)
            for name in self.broken:
                txn.delete_record(name)
        self.orphans, self.broken = [], []

    def verify(self) -> list[Record]:
        """Read every payload; return the records of which one is damaged or missing."""
        bad = set(self._missing)
        with self.store.snapshot() as snapshot:
            for record in self.index.records.values():
                for key in set(record.keys) - bad:
                    try:
                        snapshot.read(key, allocate(snapshot.nbytes(key)))
                    except (ChecksumError, TransferError):
                        bad.add(key)
        return [r for r in self.index.records.values() if not bad.isdisjoint(r.keys)]

    def close(self) -> None:
        """Write when records were last used, and close the store."""
        if self._touched:
            with self.store.transaction() as txn:
                self._put_touched(txn)
            self._touched.clear()
        self.store.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_kind(store: Store) -> dict[str, Any]:
    """Return the metadata of a store of prefixes, {} of a new one."""
    metadata = store.metadata
    with store.snapshot() as snapshot:
        empty = not metadata and len(snapshot) == 0
    if metadata.get("format") == _FORMER:
        raise StoreMismatchError(
            f"{store.path} holds KV prefixes in a former format ({_FORMER!r}, this version of "
            f"tiered-mem has {_FORMAT!r}): delete the directory; what was in it is computed again"
        )
    if not empty and metadata.get("format") != _FORMAT:
        raise StoreMismatchError(
            f"{store.path} holds other blocks than KV prefixes: name another directory"
        )
    return metadata

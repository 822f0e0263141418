"""KV prefixes that survive a restart: chains of sealed groups of tokens in a store.

A group's record and all its payloads commit in one transaction. Groups are named by a hash chain
over their token ids, as vLLM's prefix caching does, started from the model and the layout.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tiered_mem import _core
from tiered_mem.catalogue import ALIGNMENT, Bytes, allocate, round_up
from tiered_mem.errors import (
    ChecksumError,
    ConfigError,
    StoreFullError,
    StoreMismatchError,
    TransferError,
)
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.prefix_index import (
    STATE_LAYER,
    PrefixIndex,
    Record,
    TokenIds,
    group_hash,
    root_hash,
)
from tiered_mem.store import Store, Transaction

_FORMAT = "kv prefixes 1"
_NUM_RESERVED_PAGES = 64  # the trees of LMDB and what a transaction gives back late


@dataclass(frozen=True)
class Group:
    """A sealed group to save. `blocks` are (layer, buffer), `states` buffers by their number."""

    parent: bytes
    token_ids: TokenIds
    blocks: Sequence[tuple[int, Any]]
    states: Mapping[int, Any] = field(default_factory=dict)

    @property
    def hash(self) -> bytes:
        return group_hash(self.parent, self.token_ids)

    def payloads(self, index: int) -> list[tuple[BlockKey, Any]]:
        states = [(STATE_LAYER + state, data) for state, data in self.states.items()]
        return [(BlockKey(Kind.KV, layer, index), data) for layer, data in (*self.blocks, *states)]

    @property
    def nbytes(self) -> int:
        """What its payloads take in the file: each has a pad and ends its page."""
        sizes = [memoryview(data).nbytes for _, data in self.payloads(0)]
        return sum(ALIGNMENT + round_up(size, ALIGNMENT) for size in sizes)


class PrefixStore:
    """An open store of prefixes. One thread at a time."""

    def __init__(
        self, store: Store, *, root: bytes | None, block_tokens: int = 0, capacity: int | None
    ) -> None:
        """Take over `store`. Without a `root` it can be looked after, but not matched or saved."""
        self.store = store
        self.root = root or b""
        self.block_tokens = block_tokens
        self.num_damaged = 0
        self._capacity = capacity
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
        store = Store.open(directory, mode="w", capacity=capacity)
        try:
            metadata = _check_kind(store)
            models = metadata.get("models", {})
            if root.hex() not in models:
                models[root.hex()] = {"fingerprint": fingerprint, "layout": layout}
                store.set_metadata({"format": _FORMAT, "models": models})
            prefixes = cls(store, root=root, block_tokens=block_tokens, capacity=capacity)
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
        store = Store.open(directory, mode=mode)
        try:
            if not _check_kind(store):
                raise StoreMismatchError(f"{store.path} holds no KV prefixes: name another store")
            return cls(store, root=None, capacity=None)
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

    def save(self, groups: Sequence[Group]) -> list[Record]:
        """Write groups, parents before children, in one transaction; return their records.

        A group that is stored already isn't written again. Raises `ConfigError` (wrong number of
        tokens, unknown parent) and `StoreFullError`; then none of them is written.
        """
        new = self._new_groups(groups)
        keep = [name for group in groups for name in (group.hash, group.parent)]
        nbytes = sum(group.nbytes for group in new.values())
        if new:
            self._make_room(nbytes, keep)
            try:
                self._write(new)
            except StoreFullError:
                if not self._evict(2 * nbytes, keep):
                    raise
                # LMDB reuses pages from the second transaction after the one that freed them.
                for _ in range(2):
                    with self.store.transaction() as txn:
                        txn.set_metadata(self.store.metadata)
                self._write(new)
        return [self.index.records[group.hash] for group in groups]

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

    def _write(self, new: Mapping[bytes, Group]) -> None:
        now, records = time.time(), []
        with self.store.transaction() as txn:
            for index, (name, group) in enumerate(new.items(), self._next_index):
                layers = tuple(layer for layer, _ in group.blocks)
                record = Record(
                    hash=name,
                    parent=group.parent,
                    root=self.root,
                    index=index,
                    num_tokens=len(group.token_ids),
                    nbytes=group.nbytes,
                    created=now,
                    last_used=now,
                    layers=layers,
                    states=tuple(group.states),
                )
                for key, data in group.payloads(index):
                    txn.put(key, data)
                txn.put_record(name, record.pack())
                records.append(record)
            self._put_touched(txn)
        self._touched.clear()
        self._next_index += len(records)
        for record in records:
            self.index.add(record)

    def _put_touched(self, txn: Transaction) -> None:
        for name in self._touched & self.index.records.keys():
            txn.put_record(name, self.index.records[name].pack())

    def _make_room(self, nbytes: int, keep: Sequence[bytes]) -> None:
        if self._capacity is None:
            return
        limit = self._capacity - _NUM_RESERVED_PAGES * ALIGNMENT
        excess = self.index.nbytes + nbytes - limit
        if excess > 0:
            self._evict(excess, keep)
        if self.index.nbytes + nbytes > limit:
            raise StoreFullError(
                f"{self.store.path} has no room for {nbytes} bytes of KV beside what is in use: "
                "give it a larger capacity"
            )

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
                except ChecksumError:
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
    if not empty and metadata.get("format") != _FORMAT:
        raise StoreMismatchError(
            f"{store.path} holds other blocks than KV prefixes: name another directory"
        )
    return metadata

"""Stored KV prefixes: groups to save, and the records of those saved: who descends from whom."""

from __future__ import annotations

import hashlib
import heapq
import json
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem import _core
from tiered_mem.catalogue import ALIGNMENT, round_up
from tiered_mem.errors import ChecksumError, ConfigError
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.payload_file import Source

STATE_LAYER = 0x8000
"""State `i` of a group is stored as layer `STATE_LAYER + i`."""
HASH_NBYTES = 32
_CRC = struct.Struct("<I")
_FIELDS = struct.Struct("<32s32sIIQddHH")

TokenIds = npt.NDArray[np.int64]


def root_hash(fingerprint: str, layout: dict[str, Any]) -> bytes:
    """Return the hash that every chain of this model and layout starts from."""
    try:
        canonical = json.dumps(
            [fingerprint, layout], sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a KV layout holds JSON types only: {error}") from error
    return hashlib.blake2b(canonical.encode(), digest_size=HASH_NBYTES).digest()


def group_hash(parent: bytes, token_ids: TokenIds) -> bytes:
    """Return the hash of a group of token ids that follows `parent`."""
    ids = np.ascontiguousarray(token_ids, "<i8")
    return hashlib.blake2b(parent + ids.tobytes(), digest_size=HASH_NBYTES).digest()


@dataclass(frozen=True)
class Group:
    """A sealed group to save. `blocks` are (layer, data), `states` data by their number.

    Data is a C-contiguous buffer, or a `Source` that makes it when its turn has come.
    """

    parent: bytes
    token_ids: TokenIds
    blocks: Sequence[tuple[int, Any]]
    states: Mapping[int, Any] = field(default_factory=dict)

    @property
    def hash(self) -> bytes:
        return group_hash(self.parent, self.token_ids)

    def payloads(self, index: int) -> list[tuple[BlockKey, Source]]:
        states = [(STATE_LAYER + state, data) for state, data in self.states.items()]
        return [
            (BlockKey(Kind.KV, layer, index), Source.of(data))
            for layer, data in (*self.blocks, *states)
        ]

    @property
    def nbytes(self) -> int:
        """What its payloads take in their file: each ends its page."""
        return sum(round_up(source.nbytes, ALIGNMENT) for _, source in self.payloads(0))


@dataclass(frozen=True)
class Record:
    """One stored group of tokens. `nbytes` is what its payloads take; times are unix seconds."""

    hash: bytes
    parent: bytes
    root: bytes
    index: int
    num_tokens: int
    nbytes: int
    created: float
    last_used: float
    layers: tuple[int, ...]
    states: tuple[int, ...]

    @property
    def has_state(self) -> bool:
        return bool(self.states)

    @property
    def keys(self) -> list[BlockKey]:
        """The keys of its payloads: the blocks of its layers, then its states."""
        layers = [*self.layers, *(STATE_LAYER + state for state in self.states)]
        return [BlockKey(Kind.KV, layer, self.index) for layer in layers]

    def pack(self) -> bytes:
        """Return its bytes. Their checksum covers the hash, so they can't serve another one."""
        fields = _FIELDS.pack(
            self.parent,
            self.root,
            self.index,
            self.num_tokens,
            self.nbytes,
            self.created,
            self.last_used,
            len(self.layers),
            len(self.states),
        )
        body = fields + np.array([*self.layers, *self.states], "<u2").tobytes()
        return _CRC.pack(_core.crc32c(self.hash + body)) + body

    @classmethod
    def unpack(cls, name: bytes, packed: bytes) -> Record:
        """Raises `ChecksumError` if the bytes aren't those that were written for `name`."""
        body = packed[_CRC.size :]
        whole = len(name) == HASH_NBYTES and len(body) >= _FIELDS.size
        if not whole or _CRC.unpack_from(packed)[0] != _core.crc32c(name + body):
            raise ChecksumError(f"the record of prefix {name.hex()[:16]} is damaged")
        *fields, num_layers, _ = _FIELDS.unpack_from(body)
        numbers = np.frombuffer(body, "<u2", offset=_FIELDS.size).tolist()
        layers, states = tuple(numbers[:num_layers]), tuple(numbers[num_layers:])
        values: tuple[Any, ...] = (name, *fields, layers, states)
        return cls(*values)


@dataclass
class PrefixIndex:
    """The records of a store in memory, by hash."""

    records: dict[bytes, Record] = field(default_factory=dict)
    children: dict[bytes, set[bytes]] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, record: Record) -> None:
        self.records[record.hash] = record
        self.children.setdefault(record.parent, set()).add(record.hash)
        self.nbytes += record.nbytes

    def remove(self, record: Record) -> None:
        del self.records[record.hash]
        siblings = self.children[record.parent]
        siblings.remove(record.hash)
        if not siblings:
            del self.children[record.parent]
        self.nbytes -= record.nbytes

    def descendants(self, start: bytes) -> list[Record]:
        """Return the record of `start`, if there is one, and all that descend from it."""
        found, queue = [], [start]
        while queue:
            name = queue.pop()
            if name in self.records:
                found.append(self.records[name])
            queue.extend(self.children.get(name, ()))
        return found

    def headless(self) -> list[Record]:
        """Return the records whose chain doesn't reach back to its root: no prompt finds them."""
        reached: set[bytes] = set()
        for root in {record.root for record in self.records.values()}:
            reached.update(record.hash for record in self.descendants(root))
        return [record for name, record in self.records.items() if name not in reached]

    def victims(self, nbytes: int, held: Collection[bytes], keep: Iterable[bytes]) -> list[Record]:
        """Return what to evict to free `nbytes`: least recently used leaves first.

        A record with children goes after them. Those `held` and in `keep` stay. May free less.
        """
        spared = set(held) | set(keep)
        num_children = {name: len(self.children.get(name, ())) for name in self.records}
        leaves = [
            (record.last_used, -record.index, name)
            for name, record in self.records.items()
            if num_children[name] == 0 and name not in spared
        ]
        heapq.heapify(leaves)
        chosen: list[Record] = []
        while leaves and nbytes > 0:
            record = self.records[heapq.heappop(leaves)[2]]
            chosen.append(record)
            nbytes -= record.nbytes
            parent = self.records.get(record.parent)
            if parent is None or parent.hash in spared:
                continue
            num_children[parent.hash] -= 1
            if num_children[parent.hash] == 0:
                heapq.heappush(leaves, (parent.last_used, -parent.index, parent.hash))
        return chosen

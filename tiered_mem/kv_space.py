"""KV blocks on a runtime: made while a model runs, shared by sequences, gone with the last."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tiered_mem import _core
from tiered_mem.catalogue import ALIGNMENT, allocate, round_up
from tiered_mem.config import format_size
from tiered_mem.device.host import HOST
from tiered_mem.errors import (
    BudgetError,
    ChecksumError,
    ConfigError,
    EventTooLargeError,
    RuntimeClosedError,
)
from tiered_mem.keys import BlockKey, KeyArray, Kind
from tiered_mem.reading import GIVEN_BACK, Reading, Resident
from tiered_mem.store import Store
from tiered_mem.trace_actions import Action

if TYPE_CHECKING:
    from tiered_mem.runtime import Runtime

_MAX_INDEX = (1 << 32) - 1
Bytes = npt.NDArray[np.uint8]


class Recorder(Protocol):
    """Who notes what happens to the blocks. Keys are packed."""

    def reading(
        self, owner: Any, keys: KeyArray, largest: int, stream: int, most: int | None = None
    ) -> Reading:
        """Return what `Reading` of these arguments is."""

    def note(self, action: Action, keys: KeyArray) -> None:
        """Blocks came into being, or are forgotten."""


class KvSpace:
    """The KV blocks of one model's caches on a runtime. Made by `Runtime.attach_kv`.

    A block is written to the store once, when it is created, so leaving HBM costs nothing. Blocks
    are counted references: several sequences may share one. Safe to share between threads.
    """

    def __init__(self, runtime: Runtime, number: int, store: Store) -> None:
        self.runtime = runtime
        self.tiers = runtime._tiers
        self.backend = runtime.backend
        self.store = store
        self.largest_slot = 0
        self.recorder: Recorder | None = None
        self._number = number
        self._sizes: dict[int, int] = {}
        self._next: Counter[int] = Counter()
        self._staged: dict[int, Bytes] = {}
        # Blocks of other stores, by packed key: their keys there, and whom to tell of damage.
        self._adopted: dict[int, tuple[BlockKey, Callable[[BlockKey], None]]] = {}
        self._users: Counter[int] = Counter()  # by packed key
        self._abandoned: deque[list[int]] = deque()
        self._lock = threading.RLock()
        # Held while the store is written to, or the core told of blocks: closing waits for it.
        # Re-entrant: the garbage collector may close a model in the middle of anything.
        self._writing = threading.RLock()
        self._closed = False
        self._tensor: Any = None
        self._as_dtype: dict[Any, Any] = {}  # the same memory

    @property
    def closed(self) -> bool:
        return self._closed or self.runtime.closed

    @property
    def given_back(self) -> bool:
        return self._closed

    @property
    def num_blocks(self) -> int:
        """Blocks that a sequence has."""
        return len(self._users)

    def add_layer(self, layer: int, nbytes: int) -> None:
        """Say how many bytes a block of a layer has. Saying it again is fine.

        Raises `ConfigError` if they were others, `BudgetError` if HBM can't hold a block.
        """
        if not 0 <= layer < 1 << 16:
            raise ConfigError(f"layer {layer}: keys have room for {1 << 16} layers")
        with self.runtime._lock:
            known = self._sizes.setdefault(layer, nbytes)
            if known != nbytes:
                raise ConfigError(f"blocks of layer {layer} have {known} bytes, not {nbytes}")
            self.largest_slot = max(self.largest_slot, round_up(nbytes, ALIGNMENT))
            self.runtime._provide_hbm(self.largest_slot)
        if self.tiers.max_event(nbytes) < 1:
            raise BudgetError(
                f"hbm is {format_size(self.runtime.budgets.hbm)}, but a block of layer {layer} has "
                f"{format_size(nbytes)} ({nbytes} bytes): give a larger budget, or make blocks of "
                "fewer tokens"
            )

    def block_nbytes(self, layer: int) -> int:
        return self._sizes[layer]

    def create(self, layer: int, blocks: Sequence[Any], *, admit: bool = True) -> list[int]:
        """Keep new blocks of a layer; return their indices, each with one user.

        `blocks` are uint8 tensors [block_nbytes] on the runtime's device. They are in the store
        and, as far as they fit, in HBM when this returns; not so without `admit`.

        Raises `StoreFullError`, `StoreError` (then none of them is kept), `RuntimeClosedError`.
        """
        self._check_open()
        self._drop_abandoned()
        nbytes = self._sizes[layer]
        for block in blocks:
            if block.numel() != nbytes or block.element_size() != 1:
                raise ConfigError(f"a block of this layer has {nbytes} bytes, not {block.numel()}")
        with self._lock:
            first = self._next[layer]
            if first + len(blocks) > _MAX_INDEX:
                raise ConfigError(f"layer {layer} has had {first} blocks: make a new cache")
            self._next[layer] += len(blocks)
        indices = list(range(first, first + len(blocks)))
        self._write(layer, indices, blocks)
        with self._lock:
            self._users.update(self._pack(layer, indices).tolist())
        if self.recorder is not None:
            self.recorder.note(Action.CREATE, self._pack(layer, indices))
        if admit:
            self._admit(layer, indices, blocks)
        return indices

    def adopt(
        self,
        layer: int,
        places: Sequence[tuple[BlockKey, _core.Extent]],
        damaged: Callable[[BlockKey], None],
    ) -> list[int]:
        """Take in blocks that lie in another store; return their indices, each with one user.

        Their places must stay right as long as they have users. `damaged` is told the block's key
        there if its checksum fails. Raises `ConfigError` for a block of another size.
        """
        self._check_open()
        with self._lock:
            first = self._next[layer]
            self._next[layer] += len(places)
        indices = list(range(first, first + len(places)))
        keys = self._pack(layer, indices)
        with self._writing:
            self._check_open()
            self.tiers.add_blocks(keys, [extent for _, extent in places])
        with self._lock:
            self._users.update(keys.tolist())
            for key, (there, _) in zip(keys.tolist(), places, strict=True):
                self._adopted[key] = (there, damaged)
        return indices

    def share(self, layer: int, indices: Iterable[int]) -> None:
        """Count one more user of each (a block may be named several times)."""
        with self._lock:
            self._users.update(self._pack(layer, list(indices)).tolist())

    def share_all(self, names: Sequence[tuple[int, int]]) -> None:
        """As `share`, of blocks (layer, index)."""
        with self._lock:
            self._users.update(self.pack_all(names))

    def release(self, layer: int, indices: Sequence[int]) -> None:
        """Count one user less of each; a block without users is forgotten and leaves the store.

        No event of this thread may hold one of them.
        """
        if len(indices):
            self._release(self._pack(layer, indices).tolist())

    def release_all(self, names: Sequence[tuple[int, int]]) -> None:
        """As `release`, of blocks (layer, index)."""
        self._release(self.pack_all(names))

    def _release(self, keys: Sequence[int]) -> None:
        if self.closed:
            return
        gone = []
        with self._lock:
            for key in keys:
                self._users[key] -= 1
                if self._users[key] == 0:
                    del self._users[key]
                    gone.append(key)
        self._forget(gone)

    def abandon(self, layer: int, indices: Sequence[int]) -> None:
        """Release at the next `create`: for where nothing may wait, such as a finalizer."""
        self._abandoned.append([layer, *indices])

    def begin(self, layer: int, indices: Sequence[int], most: int | None = None) -> Reading:
        """Start an event: blocks `indices` (distinct) of `layer`, in waves of at most `most`.

        Raises as `Space.begin` does.
        """
        if self._closed:
            raise RuntimeClosedError(GIVEN_BACK)
        keys = self._pack(layer, indices)
        make = Reading if self.recorder is None else self.recorder.reading
        return make(self, keys, self._sizes[layer], threading.get_ident(), most)

    def read(self, layer: int, index: int, out: Bytes) -> None:
        """Copy a block into host memory of its size. That is no use of it, and moves nothing.

        Raises `ChecksumError`, `TransferError` if it isn't in HBM and can't be read.
        """
        self._check_open()
        keys = self._pack(layer, [index])
        event = self.tiers.acquire_resident(keys, threading.get_ident())
        if event is not None:
            with Resident(event, self.backend) as resident:
                self.copy_slot(resident.slots[0], out)
            return
        if int(keys[0]) in self._adopted:  # it lies in another store
            with self.begin(layer, [index]) as reading:
                for _, slot in reading:
                    self.copy_slot(slot, out)
            return
        with self.store.snapshot() as snapshot:
            snapshot.read(BlockKey(Kind.KV, layer, index), out)

    def copy_slot(self, slot: int, out: Bytes) -> None:
        """Copy what a slot of a pinned block holds into host memory of the block's size."""
        block = self.view(slot, out.nbytes)
        if block.device.type == "cpu":
            # Not by torch: it would wake its threads, which a core that is busy keeps waiting.
            np.copyto(out, block.numpy())
        else:
            HOST.wrap(out.view(np.ndarray)).copy_(block)

    def resident(self, layer: int, index: int) -> bool:
        """Whether a block is in HBM and ready."""
        return bool(self.tiers.resident(int(self._pack(layer, [index])[0])))

    def hint(self, layer: int, indices: Sequence[int]) -> None:
        """Say that the next event of `layer` in this thread reads these blocks.

        Nothing while a recorder is there: a trace is of demand alone, and of the same decisions.
        """
        if len(indices) and not self.closed and self.recorder is None:
            self.tiers.hint(self._pack(layer, indices), threading.get_ident(), True)

    def view(self, slot: int, nbytes: int) -> Any:
        """Return the bytes of a slot as a tensor on the device: uint8, [nbytes], not a copy."""
        if not self.backend.in_place:
            return self.backend.view(slot, nbytes)
        return self.memory()[slot : slot + nbytes]

    def elements(self, slot: int, nbytes: int, dtype: Any) -> tuple[Any, int]:
        """Return a tensor that a slot lies in, and where the slot begins in its storage.

        Both count elements of `dtype`: `as_strided` gets any view of the slot in one step.
        """
        if not self.backend.in_place:
            block = self.backend.view(slot, nbytes).view(dtype)
            return block, int(block.storage_offset())
        memory = self._as_dtype.get(dtype)
        if memory is None:
            whole = self.memory()
            size = len(whole) // dtype.itemsize * dtype.itemsize
            memory = self._as_dtype[dtype] = whole[:size].view(dtype)
        return memory, slot // dtype.itemsize

    def memory(self) -> Any:
        """Return all of HBM, where that is one mapping: uint8."""
        tensor = self._tensor  # another thread may close
        if tensor is None:
            if self._closed:
                raise RuntimeClosedError(GIVEN_BACK)
            memory = np.frombuffer(memoryview(self.tiers.hbm_memory()), np.uint8)
            tensor = self._tensor = self.backend.wrap(memory)
        return tensor

    def mend(self, key: BlockKey, slot: int, error: ChecksumError) -> None:
        """Raise: what a block of KV was computed from isn't here."""
        adopted = self._adopted.get(key.pack())
        if adopted is not None:
            there, damaged = adopted
            damaged(there)
        raise ChecksumError(
            f"{key._replace(space=0)}: {error}; what it was computed from is in the prompt: "
            "generate again with a new cache"
        ) from error

    def close(self) -> None:
        """Forget all blocks, once events and transfers have ended. The store is the caller's."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
        self.tiers.remove_space(self._number)
        self._tensor = None
        self._as_dtype.clear()
        with self.runtime._lock:
            self.runtime._spaces.pop(self._number, None)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeClosedError(GIVEN_BACK)

    def _pack(self, layer: int, indices: Sequence[int]) -> KeyArray:
        base = np.uint64(BlockKey(Kind.KV, layer, 0, self._number).pack())
        return np.array(indices, np.uint64) | base

    def _write(self, layer: int, indices: Sequence[int], blocks: Sequence[Any]) -> None:
        keys = [BlockKey(Kind.KV, layer, index) for index in indices]
        # A place is good for as long as its block isn't rewritten or deleted. Neither happens
        # before `_forget`, when nobody reads it any more, so no snapshot is kept.
        with self._writing:
            self._check_open()
            staged = self._staging(layer)
            as_tensor = HOST.wrap(staged.view(np.ndarray))
            with self.store.transaction() as txn:
                for key, block in zip(keys, blocks, strict=True):
                    as_tensor.copy_(block)
                    txn.put(key, staged)  # LMDB has its own copy then
            with self.store.snapshot() as snapshot:
                extents: list[_core.Extent] = snapshot.extents(keys)
            self.tiers.add_blocks(self._pack(layer, indices), extents)

    def _staging(self, layer: int) -> Bytes:
        """Return memory for one block on its way to the store, made once by size."""
        nbytes = self._sizes[layer]
        if nbytes not in self._staged:
            self._staged[nbytes] = allocate(nbytes)
        return self._staged[nbytes]

    def _admit(self, layer: int, indices: Sequence[int], blocks: Sequence[Any]) -> None:
        """Put as many of the blocks into HBM as an event can hold there, the latest ones."""
        nbytes = self._sizes[layer]
        most = int(self.tiers.max_event(nbytes))
        keys = self._pack(layer, indices[-most:] if most else [])
        if len(keys) == 0:
            return
        try:
            event = self.tiers.create(keys, threading.get_ident(), self.backend.compute())
        except EventTooLargeError:
            return  # HBM has shrunk since: they are in the store
        except ConfigError:
            self._check_open()  # the core has forgotten them since
            raise
        try:
            for position, (slot, block) in enumerate(
                zip(event.slots, blocks[-len(keys) :], strict=True)
            ):
                self.view(slot, nbytes).copy_(block)
                event.repaired(position)
        finally:
            event.release(self.backend.compute())

    def _forget(self, keys: list[int]) -> None:
        if not keys:
            return
        if self.recorder is not None:
            self.recorder.note(Action.REMOVE, np.array(keys, np.uint64))
        self.tiers.remove_blocks(np.array(keys, np.uint64))
        own = [key for key in keys if self._adopted.pop(key, None) is None]
        if not own:
            return
        with self._writing:
            if self.closed:
                return
            with self.store.transaction() as txn:
                for key in own:
                    txn.delete(BlockKey.unpack(key)._replace(space=0))

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            layer, *indices = self._abandoned.popleft()
            self.release(layer, indices)

    def pack_all(self, names: Sequence[tuple[int, int]]) -> list[int]:
        """Return the packed keys of blocks (layer, index)."""
        return [BlockKey(Kind.KV, layer, index, self._number).pack() for layer, index in names]

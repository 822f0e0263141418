"""An event under way: its blocks as they arrive, in waves if it needs more than there are slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tiered_mem import _core
from tiered_mem.errors import (
    ChecksumError,
    ConfigError,
    EventTooLargeError,
    RuntimeClosedError,
)
from tiered_mem.keys import BlockKey, KeyArray

if TYPE_CHECKING:
    from tiered_mem.device import Backend

GIVEN_BACK = "this model's blocks were given back: load it again to use it"


_MOST_BLOCKS = 32  # of a wave of KV, or more that are small
_MOST_NBYTES = 1 << 20
_WAVES_AHEAD = 3  # of short waves, so that neither the link nor who computes waits for the other


def blocks_of_wave(tiers: _core.Tiers, nbytes: int) -> int:
    """Return how many KV blocks of this size to pin at a time, and so to compute with.

    With those on their way they take half of HBM: the rest is for what was read before.
    """
    most = max(_MOST_BLOCKS, _MOST_NBYTES // nbytes)
    return max(1, min(most, int(tiers.max_event(nbytes)) // (2 * (1 + _WAVES_AHEAD))))


class Owner(Protocol):
    """Whose blocks an event reads."""

    @property
    def tiers(self) -> _core.Tiers: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def given_back(self) -> bool:
        """Whether the blocks were forgotten."""

    def mend(self, key: BlockKey, slot: int, error: ChecksumError) -> None:
        """Fill the slot of a block that is damaged in the store. Raises if that can't be."""


class _Wave(NamedTuple):
    """A part of an event that holds its slots, and its blocks' positions in the event."""

    event: Any
    positions: Sequence[int]


class Reading:
    """An event under way: iterate over it to get (position, slot) as the blocks arrive.

    `batches` gives the same in lists, of blocks that became ready together. On a device that
    orders its streams, a block is ready once what is computed on the current stream comes after
    its arrival; the end of a wave comes after all that the stream was given before.

    Use it in a `with` statement. A body that fails would otherwise leave the blocks pinned for as
    long as something (a traceback) refers to the iteration.

    A slot (byte offset into HBM's memory, or an address of the device's) is good until the next
    step of the iteration after which the event's wave ends; don't keep views of it beyond the loop.
    An event with more blocks than HBM has slots, or than it is given for a wave, runs in waves,
    present blocks first, the next wave (of short ones: the next few) loading meanwhile. Short waves
    pin little, so that what was there before them may stay; `waves` gives each when all of it is
    ready.
    """

    __slots__ = (
        *("_ahead", "_backend", "_current", "_keys", "_largest", "_most_ahead", "_owner"),
        *("_stream", "_tiers", "_waves"),
    )

    def __init__(
        self, owner: Owner, keys: KeyArray, largest: int, stream: int, most: int | None = None
    ) -> None:
        """Start the event of `keys` (distinct), none of whose blocks is above `largest` bytes.

        `most`: blocks of a wave; None: as many as HBM can hold.
        """
        self._owner = owner
        self._tiers = owner.tiers
        self._backend = owner.backend
        self._keys = keys
        self._largest = largest
        self._stream = stream
        # The positions of each wave that hasn't started.
        self._waves = self._plan(range(len(keys)), most)
        self._most_ahead = 1 if most is None else _WAVES_AHEAD
        self._ahead: deque[_Wave] = deque()
        self._current = self._start()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        for wave in (self._current, *self._ahead):
            if wave is not None:
                wave.event.release(self._backend.compute())
        self._current = None
        self._ahead.clear()

    def _plan(self, positions: Sequence[int], most: int | None = None) -> list[Sequence[int]]:
        """Cut `positions` into waves of at most `most` blocks."""
        size = len(positions)
        if size > (limit := self._tiers.max_event(self._largest)):
            size = max(1, limit // 2)  # half the slots, so that the next wave can load
        if most is not None:
            size = min(size, most)
        if size >= len(positions):
            return [positions]
        # Hints are judged by the whole event, not by its first wave.
        present = self._tiers.announce(self._keys, self._stream)
        order = sorted(positions, key=lambda position: not present[position])
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _start(self, wait: bool = True) -> _Wave | None:
        """Start the next wave; None if it had to wait for slots and mustn't, or there is none."""
        while self._waves:
            positions = self._waves[0]
            whole = isinstance(positions, range)
            keys = self._keys if whole else self._keys[positions]
            try:
                event = self._tiers.acquire(keys, self._stream, wait)
            except EventTooLargeError:
                # HBM has shrunk since the waves were planned.
                if len(positions) == 1:
                    raise
                left = [position for wave in self._waves for position in wave]
                self._waves = self._plan(left, most=len(positions) // 2)
                continue
            except ConfigError:
                if self._owner.given_back:  # since by another thread: the core forgot the blocks
                    raise RuntimeClosedError(GIVEN_BACK) from None
                raise
            if event is None:
                return None
            del self._waves[0]
            return _Wave(event, positions)
        return None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for positions, slots in self.batches():
            yield from zip(positions, slots, strict=True)

    def batches(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (positions, slots) of blocks that became ready together."""
        for wave in self._each_wave():
            yield from self._drain(*wave)

    def waves(self) -> Iterator[tuple[Sequence[int], list[int]]]:
        """Yield (positions, slots) of each wave, all of whose blocks are ready."""
        for wave in self._each_wave():
            for _ in self._drain(*wave):
                pass
            yield wave.positions, wave.event.slots

    def _each_wave(self) -> Iterator[_Wave]:
        while self._current is not None:
            # Without waiting: whoever waits for slots must hold none.
            while len(self._ahead) < self._most_ahead:
                wave = self._start(wait=False)
                if wave is None:
                    break
                self._ahead.append(wave)
            yield self._current
            self._current.event.release(self._backend.compute())
            self._current = self._ahead.popleft() if self._ahead else self._start()

    def _drain(self, event: Any, positions: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        slots = event.slots
        left = len(slots)
        ordered = self._backend.stream_ordered
        while left:
            ready, failed = event.wait_any(self._backend.compute() if ordered else 0)
            for i, error in failed:
                key = BlockKey.unpack(int(self._keys[positions[i]]))
                if not isinstance(error, ChecksumError):
                    raise type(error)(f"{key}: {error}") from error
                self._owner.mend(key, slots[i], error)
                event.repaired(i)
                ready.append(i)
            left -= len(ready)
            yield [positions[i] for i in ready], [slots[i] for i in ready]


class Resident:
    """Blocks of an event that were all in HBM, pinned inside a `with` statement."""

    __slots__ = ("_backend", "_event", "slots")

    def __init__(self, event: Any, backend: Backend) -> None:
        self._event, self._backend = event, backend
        self.slots: list[int] = event.slots

    def __enter__(self) -> Resident:
        compute = self._backend.compute() if self._backend.stream_ordered else 0
        left = len(self.slots)
        while left:
            ready, _ = self._event.wait_any(compute)  # at once: they were ready when it began
            left -= len(ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._event.release(self._backend.compute())

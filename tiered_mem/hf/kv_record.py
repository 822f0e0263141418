"""Recording what a model's caches make, read and give back as a trace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tiered_mem.errors import RuntimeClosedError, TraceError
from tiered_mem.hf.forwards import Forwards
from tiered_mem.hf.route import model_info
from tiered_mem.keys import KeyArray
from tiered_mem.reading import Reading
from tiered_mem.trace import Action, Form, Phase, Trace, TraceHeader

if TYPE_CHECKING:
    from tiered_mem.hf.kv import KvPool

_ALL_BUT_SPACE = np.uint64(~(0xFF << 48) & (1 << 64) - 1)


@dataclass
class _Event:
    action: Action
    keys: KeyArray  # as in the store: without the space
    sequence: int
    step: int
    phase: Phase
    gap_seconds: float
    compute_seconds: float = 0.0


@dataclass
class _Clock(threading.local):
    """This thread's time, without what it waited for blocks."""

    ended: float | None = None  # the last event


class KvRecorder:
    """Records the blocks of a model's caches while it is entered. Made by `KvPool.record`.

    An event is what a layer reads at a step; or blocks of a layer that are made, or given back. A
    sequence is as `Forwards` says. What making blocks takes counts as time between events.
    """

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._forwards = Forwards(pool.model)
        self._events: list[_Event] = []
        self._lock = threading.Lock()
        self._clock = _Clock()

    def __enter__(self) -> KvRecorder:
        if self._pool.closed:
            raise RuntimeClosedError("this model's KV memory was given back: load the model again")
        self._forwards.__enter__()
        self._pool.space.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.space.recorder = None
        self._forwards.__exit__()

    def trace(self, name: str = "recorded", *, source: str = "", note: str = "") -> Trace:
        """Return what was recorded. Raises `TraceError` if no block was read."""
        with self._lock:
            events = list(self._events)
        if not any(event.action is Action.READ for event in events):
            raise TraceError(
                "nothing was recorded: no cache read a block; a context of more tokens than a "
                f"block's ({self._pool.block_tokens}) has some"
            )
        pool = self._pool
        counts = [len(event.keys) for event in events]
        keys = np.concatenate([event.keys for event in events])
        layers = (keys >> np.uint64(32)).astype(np.uint16)
        sizes = {layer: pool.space.block_nbytes(layer) for layer in set(layers.tolist())}

        def column(values: list[Any]) -> np.ndarray[Any, Any]:
            return np.repeat(np.array(values), counts)

        return Trace.from_rows(
            TraceHeader(
                Form.EVENTS,
                model=model_info(pool.model.config, 0).name,
                source=source,
                num_layers=1 + max(sizes),
                block_num_tokens=pool.block_tokens,
                note=note,
            ),
            name=name,
            index=keys.astype(np.uint32),
            layer=layers,
            kind=(keys >> np.uint64(56)).astype(np.uint8),
            nbytes=np.array([sizes[layer] for layer in layers.tolist()]),
            step=column([event.step for event in events]),
            phase=column([event.phase for event in events]),
            sequence=column([event.sequence for event in events]),
            event_start=np.append(0, np.cumsum(counts)[:-1]),
            action=np.array([event.action for event in events]),
            gap_seconds=np.array([event.gap_seconds for event in events], np.float32),
            compute_seconds=np.array([event.compute_seconds for event in events], np.float32),
        )

    # --- called by the space: see tiered_mem.kv_space.Recorder ---

    def reading(
        self, owner: Any, keys: KeyArray, largest: int, stream: int, most: int | None = None
    ) -> Reading:
        if len(keys) == 0:
            return Reading(owner, keys, largest, stream, most)
        event = self._note(Action.READ, keys)
        return _TimedReading(self, event, owner, keys, largest, stream, most)

    def note(self, action: Action, keys: KeyArray) -> None:
        if len(keys):
            self._note(action, keys)

    def ended(self, event: _Event, seconds: float) -> None:
        """Note that a read has computed for so long."""
        event.compute_seconds = max(seconds, 0.0)
        self._clock.ended = time.perf_counter()

    def stall_seconds(self) -> float:
        return self._pool.runtime.stats().stall_seconds

    def _note(self, action: Action, keys: KeyArray) -> _Event:
        here, now = self._forwards.here, time.perf_counter()
        gap = 0.0 if self._clock.ended is None else now - self._clock.ended
        keys = keys & _ALL_BUT_SPACE
        event = _Event(action, keys, here.sequence, here.num_tokens, here.phase, gap)
        with self._lock:
            self._events.append(event)
        self._clock.ended = time.perf_counter()  # what recording took isn't the model's
        return event


class _TimedReading(Reading):
    """An event that tells how long it computed, which is all its time but that of waiting."""

    __slots__ = ("_event", "_recorder", "_stalled", "_started")

    def __init__(self, recorder: KvRecorder, event: _Event, *arguments: Any) -> None:
        self._recorder, self._event = recorder, event
        self._stalled, self._started = recorder.stall_seconds(), time.perf_counter()
        super().__init__(*arguments)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        took = time.perf_counter() - self._started
        self._recorder.ended(self._event, took - self._recorder.stall_seconds() + self._stalled)

"""Recording a wrapped model's events as a trace."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tiered_mem.errors import RuntimeClosedError, TraceError
from tiered_mem.hf.forwards import Forwards
from tiered_mem.trace import Form, Phase, Trace, TraceHeader

if TYPE_CHECKING:
    from tiered_mem.hf.handle import TieredModel
    from tiered_mem.policies.prefetch import Route


class _Event(NamedTuple):
    sequence: int
    step: int
    phase: Phase
    layer: int
    ids: Sequence[int]  # in the order in which the runtime was asked for them
    weights: Sequence[float]
    gap_seconds: float
    compute_seconds: float
    ahead: Sequence[int]
    hidden: np.ndarray[Any, Any] | None


@dataclass
class _Thread(threading.local):
    """What is noted of this thread's forward."""

    events: list[_Event] = field(default_factory=list)  # of this forward
    ended: float = 0.0  # the last event, seconds
    started: float = 0.0
    stall_ns: int = 0
    route: Route | None = None


class Recorder:
    """Records what a model's experts are asked for while it is entered. Made by `record()`.

    An event is a layer step, of all tokens of the forward; a sequence is as `Forwards` says.

    Args:
        handle: of the wrapped model.
        predictions: keep what the next gates predict, so that next-gate can be simulated.
        hidden: keep the residual of each event's last token too, to train heads on.
    """

    def __init__(self, handle: TieredModel, *, predictions: bool = True, hidden: bool = False):
        self._handle = handle
        self._observes = predictions or hidden
        self._keep_ahead, self._keep_hidden = predictions, hidden
        self._events: list[_Event] = []
        self._lock = threading.Lock()
        self._forwards = Forwards(handle.model)
        self._thread = _Thread()

    def __enter__(self) -> Recorder:
        handle = self._handle
        if handle.closed:
            raise RuntimeClosedError("this model is closed: load it again to record it")
        self._forwards.__enter__()
        self._hook = handle.model.register_forward_pre_hook(self._on_forward)
        for experts in handle.experts:
            experts.recorder = self
        if self._observes:
            handle.hooks.observe(self._on_route)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._forwards.__exit__()
        self._handle.hooks.observe(None)
        for experts in self._handle.experts:
            experts.recorder = None

    def trace(self, name: str = "recorded", *, source: str = "", note: str = "") -> Trace:
        """Return what was recorded. Raises `TraceError` if that is nothing."""
        events = self._events
        if not events:
            raise TraceError("nothing was recorded: the model's experts weren't called")
        counts = [len(event.ids) for event in events]

        def column(values: Sequence[Any]) -> np.ndarray[Any, Any]:
            return np.repeat(np.array(values), counts)

        per_event: dict[str, Any] = {
            "gap_seconds": np.array([event.gap_seconds for event in events], np.float32),
            "compute_seconds": np.array([event.compute_seconds for event in events], np.float32),
        }
        if self._keep_ahead:
            lengths = [len(event.ahead) for event in events]
            per_event["ahead_offset"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
            per_event["ahead_index"] = _joined([event.ahead for event in events], np.uint32)
        if self._keep_hidden:
            hidden = [event.hidden for event in events if event.hidden is not None]
            if len(hidden) < len(events):
                raise TraceError(
                    "the residual stream wasn't known at every router: run the model three times "
                    "under record() first; it stays unknown where layers are built unusually"
                )
            per_event["hidden"] = np.stack(hidden).astype(np.float16)
        return Trace.from_rows(
            self._header(source, note),
            name=name,
            index=_joined([event.ids for event in events], np.uint32),
            weight=_joined([event.weights for event in events], np.float32),
            nbytes=column([self._handle.layouts[event.layer].nbytes for event in events]),
            step=column([event.step for event in events]),
            layer=column([event.layer for event in events]),
            phase=column([event.phase for event in events]),
            sequence=column([event.sequence for event in events]),
            **per_event,
        )

    def _header(self, source: str, note: str) -> TraceHeader:
        layouts = self._handle.layouts
        numbers = {layout.num_experts for layout in layouts}
        same = numbers.pop() if len(numbers) == 1 else None
        top_k = getattr(self._handle.model.config.get_text_config(), "num_experts_per_tok", None)
        return TraceHeader(
            Form.EVENTS,
            model=self._handle.hooks.info.name,
            source=source,
            num_layers=len(layouts),
            num_experts=same,
            top_k=top_k if isinstance(top_k, int) else None,
            expert_nbytes=tuple(layout.nbytes for layout in layouts) if same else (),
            note=note,
        )

    # --- called by the model ---

    def _on_forward(self, *_: Any) -> None:
        self._thread.events.clear()

    def forget(self) -> None:
        """Drop the events of this thread's forward: it failed and runs again."""
        here = self._thread
        void = {id(event) for event in here.events}
        with self._lock:
            self._events = [event for event in self._events if id(event) not in void]
        here.events.clear()
        here.route = None

    def _on_route(self, route: Route) -> None:
        self._thread.route = route

    def start(self) -> None:
        """Note that an event begins."""
        here = self._thread
        here.route = None
        here.stall_ns = self._handle.runtime.stats().stall_ns
        here.started = time.perf_counter()

    def finish(
        self, layer: int, ids: Sequence[int], index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Note that it has ended: `ids` were read, routed by `index` [tokens, k] and `weights`."""
        here, stands, now = self._thread, self._forwards.here, time.perf_counter()
        stall = (self._handle.runtime.stats().stall_ns - here.stall_ns) / 1e9
        gap = here.started - here.ended if here.ended else 0.0
        route = here.route
        ahead: Sequence[int] = ()
        hidden = None
        if route is not None and self._keep_ahead:
            ahead = [int(i) for i in route.look_ahead()]
        if route is not None and self._keep_hidden:
            hidden = route.residual()
        sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
        sums.index_add_(0, index.reshape(-1), weights.reshape(-1).double())
        event = _Event(
            stands.sequence,
            stands.num_tokens,
            stands.phase,
            layer,
            ids,
            sums[torch.as_tensor(ids)].tolist(),
            gap,
            max(now - here.started - stall, 0.0),
            ahead,
            hidden,
        )
        here.events.append(event)
        with self._lock:
            self._events.append(event)
        # What recording took isn't the model's.
        here.ended = time.perf_counter()


def _joined(parts: Sequence[Sequence[Any]], dtype: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(part, dtype) for part in parts])

"""Routes of a recorded trace, forced on a model of random weights, and a predictor that errs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bars  # noqa: F401  # puts the folder above on the path
import numpy as np
import numpy.typing as npt
import torch
from random_model import Shape
from route_grid import made_up_trace
from tiered_mem.policies.prefetch import Oracle, Predictor, Route

from tiered_mem.trace import Form, Phase, Trace, TraceHeader
from tiered_mem.trace_formats import import_trace

Ids = npt.NDArray[np.int64]
_SEED = 0


def load_trace(path: Path | None, *, smoke: bool) -> Trace:
    """Read a trace, ours or in a foreign format; a smoke run without one makes it up."""
    if path is None and smoke:
        return made_up_trace()
    if path is None:
        raise SystemExit("no trace: name one by --trace, a route CSV or what `trace import` made")
    return Trace.load(path) if path.suffix == ".npz" else import_trace(path)


def routes_of(trace: Trace, shape: Shape) -> Ids:
    """Return the expert ids of the trace's decode tokens, [tokens, layers, top_k], distinct.

    Layers beyond the trace's take its layers again from the first on. Where the trace has fewer ids
    a token than the model wants, the rest are drawn by how often the layer uses each expert: as
    popular as real ones, but with no memory of the last token, so that no cache is flattered.
    """
    num_experts = trace.header.num_experts or 0
    if num_experts != shape.num_experts:
        raise SystemExit(f"the trace has {num_experts} experts, the model {shape.num_experts}")
    by_layer: dict[int, dict[int, list[int]]] = {}
    for event in np.flatnonzero(trace.event_phase == Phase.DECODE).tolist():
        ids = (trace.event(event) & np.uint64(0xFFFFFFFF)).tolist()
        by_layer.setdefault(int(trace.event_layer[event]), {})[int(trace.event_step[event])] = ids
    steps = sorted(set.intersection(*(set(events) for events in by_layer.values())))
    random = np.random.default_rng(_SEED)
    layers = sorted(by_layer)
    routes = np.empty((len(steps), shape.num_layers, shape.top_k), np.int64)
    for layer in range(shape.num_layers):
        events = by_layer[layers[layer % len(layers)]]
        used = np.bincount(np.concatenate([events[step] for step in steps]), minlength=num_experts)
        for token, step in enumerate(steps):
            routes[token, layer] = _widened(events[step], used, shape.top_k, random)
    return routes


def _widened(ids: list[int], used: Ids, top_k: int, random: np.random.Generator) -> list[int]:
    missing = top_k - len(ids)
    if missing <= 0:
        return ids[:top_k]
    odds = used + 1.0  # the unused ones too, now and then
    odds[ids] = 0
    return ids + random.choice(len(odds), missing, replace=False, p=odds / odds.sum()).tolist()


def as_trace(ids: Ids, num_experts: int, block_nbytes: int) -> Trace:
    """Return routes [tokens, layers, top_k] as a trace whose events come token by token."""
    _, num_layers, top_k = ids.shape
    step, layer, _ = np.indices(ids.shape)
    header = TraceHeader(
        Form.EVENTS,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_nbytes=(block_nbytes,) * num_layers,
    )
    columns = {"index": ids.ravel(), "step": step.ravel(), "layer": layer.ravel()}
    return Trace.from_rows(header, nbytes=block_nbytes, **columns)


class ForcedRoutes:
    """Replaces what a model's routers choose: ids of a trace, all with the same weight.

    `position` is the token that comes next; whoever feeds the model moves it. The ids lie on the
    device beforehand, so that forcing them makes the host wait for nothing.
    """

    def __init__(self, ids: Ids, device: torch.device) -> None:
        self.position = 0
        self.num_tokens, _, self._top_k = ids.shape
        by_layer = np.ascontiguousarray(ids.transpose(1, 0, 2))
        self._ids = torch.from_numpy(by_layer).to(device)

    def force(self, model: Any) -> list[Any]:
        """Force the routers of a Qwen3-MoE. Returns the hooks' handles."""
        return [
            layer.mlp.gate.register_forward_hook(self._hook(number))
            for number, layer in enumerate(model.model.layers)
        ]

    def _hook(self, layer: int) -> Any:
        def replace(module: Any, args: Any, output: Any) -> Any:
            logits, scores, _ = output
            first = self.position
            ids = self._ids[layer, first : first + scores.size(0)]
            return logits, torch.full_like(scores, 1 / self._top_k), ids

        return replace


class Foresight(Predictor):
    """The shipped oracle, `oracle(RECALL,1)`, let loose on a running model whose routes are forced.

    As a next-layer gate does, it says nothing across tokens: the first layer isn't predicted.
    """

    name = "foresight"
    summary = "recorded routes with a set share of mistakes"
    source = "this benchmark"
    uses_tables = False
    learns = False

    def __init__(self, trace: Trace, routes: ForcedRoutes, recall: float) -> None:
        self._oracle = Oracle(recall, 1)
        self._oracle.foresee(trace)
        self._num_layers = trace.header.num_layers or 1
        self._routes = routes
        self.on = True

    def predict(self, route: Route) -> Sequence[int]:
        if not self.on or route.next_layer <= route.layer:
            return ()
        event = self._routes.position * self._num_layers + route.layer
        hints = dict(self._oracle.hints(event))
        return hints.get(route.next_layer, ())

"""Trains the heads of the `learned` predictor on recorded hidden states, and says what they reach.

A head maps the residual stream at one layer's router to scores of the experts of the next event,
by a linear map or a tiny MLP for each pair of layers. It learns from a trace with the column
`hidden`, in decode: there an event is one token's, and the residual is that token's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tiered_mem.errors import ConfigError, TraceError
from tiered_mem.keys import Kind
from tiered_mem.policies.prefetch import Decision, Predictor, make_predictor
from tiered_mem.policies.prefetch.learned import EPSILON, Head, Learned
from tiered_mem.trace import Phase, Trace

_BATCH = 256
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.05
_SMALLEST_SPREAD = 1e-3  # of a feature: one that never changes says nothing
_BASELINES = ("previous-token", "frequency", "transition", "eam")

Progress = Callable[[int, int], None]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Recall(NamedTuple):
    """The share of the experts used that were among the first k, and the first 2k, guessed."""

    at_k: float
    at_2k: float


@dataclass(frozen=True)
class HeadReport:
    """What a head was trained on, and how it and others guess the events held out."""

    num_trained: int
    num_held_out: int
    recall: dict[str, Recall]


@dataclass(frozen=True)
class Lesson:
    """What a trace teaches: its events, and which one follows which in the same sequence.

    `source` and `target` name events; `held_out` says of each such pair whether it is kept from
    training: those of the last sequences, or of the end of the only one.
    """

    trace: Trace
    hidden: npt.NDArray[np.float16]
    num_experts: int
    top_k: int
    source: Integers
    target: Integers
    held_out: Mask

    @classmethod
    def of(cls, trace: Trace, held_out: float) -> Lesson:
        """Raises `TraceError` if there is nothing to learn from; `ConfigError` for the share."""
        if not 0 < held_out < 1:
            raise ConfigError(f"the share held out is {held_out}; it must lie between 0 and 1")
        if trace.hidden is None:
            raise TraceError(
                f"{trace.name} has no hidden states: record it by tiered-mem trace record --hidden"
            )
        if trace.header.num_experts is None:
            raise TraceError(f"{trace.name} doesn't say how many experts its model has")
        source, target = _following(trace.event_sequence)
        usable = (trace.event_kind == Kind.EXPERT) & (trace.event_phase == Phase.DECODE)
        hidden = trace.hidden
        known = np.isfinite(hidden).all(1) & (hidden != 0).any(1)
        fine = usable[source] & usable[target] & known[source]
        source, target = source[fine], target[fine]
        if not len(source):
            raise TraceError(f"{trace.name} has no decode events with hidden states")
        held = _held_out(trace.event_sequence[source], held_out)
        if held.all() or not held.any():
            raise TraceError(f"{trace.name} is too short to hold {held_out:g} of it out")
        sizes = np.diff(trace.offsets)[target]
        top_k = trace.header.top_k or int(np.median(sizes))
        return cls(trace, hidden, trace.header.num_experts, top_k, source, target, held)

    @property
    def hidden_size(self) -> int:
        return int(self.hidden.shape[1])

    def layers(self) -> Integers:
        """Return the layers of each pair, [pairs, 2]."""
        layer = self.trace.event_layer.astype(np.int64)
        return np.stack([layer[self.source], layer[self.target]], 1)

    def ids(self, event: int) -> Integers:
        """Return an event's experts."""
        return (self.trace.event(event) & np.uint64(0xFFFFFFFF)).astype(np.int64)

    def decision(self, event: int, following: int) -> Decision:
        """Return an event as predictors are shown it."""
        trace = self.trace
        return Decision(
            layer=int(trace.event_layer[event]),
            next_layer=int(trace.event_layer[following]),
            ids=self.ids(event).tolist(),
            num_experts=self.num_experts,
            top_k=self.top_k,
            stream=int(trace.event_sequence[event]),
            ahead=() if trace.ahead_offset is None else trace.ahead(event).tolist(),
            state=self.hidden[event].astype(np.float32),
        )

    def residuals(self, events: Integers) -> torch.Tensor:
        """Return the residuals [events, hidden], each divided by its root mean square."""
        x = torch.from_numpy(self.hidden[events].astype(np.float32))
        normed: torch.Tensor = x / (x.square().mean(1, keepdim=True) + EPSILON).sqrt()
        return normed

    def shares(self, events: Integers) -> torch.Tensor:
        """Return what of each event goes to which expert, [events, experts], summing to 1."""
        shares = torch.zeros(len(events), self.num_experts)
        for row, event in enumerate(events.tolist()):
            ids = self.ids(event)
            shares[row, ids] = 1 / len(ids)
        return shares


def train_head(
    trace: Trace,
    *,
    held_out: float = 0.25,
    units: int = 0,
    epochs: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Head, HeadReport]:
    """Train a head for each pair of layers that follow each other in a trace.

    Args:
        trace: with the column `hidden`.
        held_out: share of the sequences (of the tokens, if there is only one sequence) that is
            kept from training, the last ones.
        units: of the MLP's inner layer; 0 for a linear map.
        epochs: passes over the trace.
        seed: of the order of examples and the MLP's first weights.
        progress: called with (pairs of layers done, pairs in all).

    Raises `TraceError` for a trace that has nothing to learn from, `ConfigError` for options.
    """
    for name, value, lowest in (("units", units, 0), ("epochs", epochs, 1)):
        if value < lowest:
            raise ConfigError(f"{name} is {value}; it must be at least {lowest}")
    lesson = Lesson.of(trace, held_out)
    layers = lesson.layers()
    pairs = np.unique(layers[~lesson.held_out], axis=0)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for done, pair in enumerate(pairs):
        mine = (layers == pair).all(1) & ~lesson.held_out
        x, shares = lesson.residuals(lesson.source[mine]), lesson.shares(lesson.target[mine])
        parts.append(_train(x, shares, units, epochs, generator))
        if progress is not None:
            progress(done + 1, len(pairs))
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    head = Head(
        trace.header.model,
        lesson.num_experts,
        lesson.hidden_size,
        pairs.astype(np.int64),
        **stacked,
    )
    counts = int((~lesson.held_out).sum()), int(lesson.held_out.sum())
    return head, HeadReport(*counts, _compare(lesson, head))


def _train(
    x: torch.Tensor, shares: torch.Tensor, units: int, epochs: int, generator: torch.Generator
) -> dict[str, npt.NDArray[np.float32]]:
    """Fit shares [n, experts] to x [n, hidden] by cross-entropy. Returns a head's arrays."""
    mean, spread = x.mean(0), x.std(0, correction=0).clamp_min(_SMALLEST_SPREAD)
    x = (x - mean) / spread
    layers = _new_layers(x.shape[1], units, shares, generator)
    parameters = [p for layer in layers for p in layer]
    num_steps = epochs * -(-len(x) // _BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in torch.split(order, _BATCH):
            optimizer.zero_grad()
            scores = _apply(layers, x[rows])
            nn.functional.cross_entropy(scores, shares[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    # The head is given x as it is: what was subtracted and divided goes into the first layer.
    with torch.no_grad():
        weight, bias = layers[0]
        weight /= spread
        bias -= weight @ mean
    names = ("weight", "bias") if not units else ("inner_weight", "inner_bias", "weight", "bias")
    return {name: p.detach().numpy() for name, p in zip(names, parameters, strict=True)}


def _new_layers(
    hidden: int, units: int, shares: torch.Tensor, generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and biases that score by frequency alone at first."""
    frequency = (shares.mean(0) + 1e-4).log()
    last = (torch.zeros(shares.shape[1], units or hidden), frequency)
    layers = [last]
    if units:
        inner = torch.randn(units, hidden, generator=generator) / hidden**0.5
        layers.insert(0, (inner, torch.zeros(units)))
    return [(weight.requires_grad_(), bias.requires_grad_()) for weight, bias in layers]


def _apply(layers: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    for weight, bias in layers[:-1]:
        x = nn.functional.linear(x, weight, bias).relu()
    return nn.functional.linear(x, *layers[-1])


def _following(sequences: npt.NDArray[Any]) -> tuple[Integers, Integers]:
    """Return (event, the next one of its sequence) for all that have one, in the trace's order."""
    order = np.argsort(sequences, kind="stable")
    same = sequences[order[1:]] == sequences[order[:-1]]
    source, target = order[:-1][same], order[1:][same]
    by_time = np.argsort(source)
    return source[by_time], target[by_time]


def _held_out(sequences: npt.NDArray[Any], share: float) -> Mask:
    """Say of each pair, in the order of time, whether it is of the part that comes last."""
    _, firsts = np.unique(sequences, return_index=True)
    in_order = sequences[np.sort(firsts)]
    if len(in_order) == 1:
        return np.arange(len(sequences)) >= round(len(sequences) * (1 - share))
    count = min(max(round(len(in_order) * share), 1), len(in_order) - 1)
    return np.isin(sequences, in_order[-count:])


def _compare(lesson: Lesson, head: Head) -> dict[str, Recall]:
    """Return the recall of this head and of others on what was held out."""
    peers: dict[str, Predictor] = {"learned": Learned(head)}
    if lesson.trace.ahead_offset is not None:
        peers["next-gate"] = make_predictor("next-gate")
    peers |= {name: make_predictor(name) for name in _BASELINES}
    return {name: measure_recall(lesson, predictor) for name, predictor in peers.items()}


def measure_recall(lesson: Lesson, predictor: Predictor) -> Recall:
    """Show a predictor the whole trace in order, and count its guesses of what was held out."""
    counted = set(lesson.target[lesson.held_out].tolist())
    trace, k = lesson.trace, lesson.top_k
    num_used = num_at_k = num_at_2k = 0
    for event, following in zip(
        *map(np.ndarray.tolist, _following(trace.event_sequence)), strict=True
    ):
        guess = list(predictor.predict(lesson.decision(event, following)))
        if following in counted:
            used = set(lesson.ids(following).tolist())
            num_used += len(used)
            num_at_k += len(used.intersection(guess[:k]))
            num_at_2k += len(used.intersection(guess[: 2 * k]))
    return Recall(num_at_k / num_used, num_at_2k / num_used)

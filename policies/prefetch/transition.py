"""Which experts follow which, from one layer to the next."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from .base import Floats, PerStream, Predictor, Route, grown, num_to_rank, parse_number, rank

_TOO_LARGE, _SMALLEST = 1e30, 1e-30  # of a float32


class Transition(Predictor):
    """Counts how often expert j of a layer follows expert i of the layer before it, online.

    A layer's experts are ranked by the mean of P(j | i) over the experts i that the layer before
    it has just used. After the last layer comes the first one, of the next token. Memory: one
    float32 matrix [experts, experts] a layer, whatever the number of streams.

    Args:
        half_life: Events of a layer after which what was seen counts half.
    """

    name = "transition"
    summary = "the experts that have followed this layer's experts: P(j at l+1 | i at l), online"
    source = "inter-layer expert affinity: ExFlow (Yao et al. 2024), arXiv 2401.08383"
    arguments = "[half life in tokens]"

    def __init__(self, half_life: float = 4096) -> None:
        self._growth = 2 ** (1 / half_life)
        self._pairs: dict[tuple[int, int], _Pairs] = {}
        self._streams: PerStream[_Stream] = PerStream(_Stream)
        self._lock = threading.Lock()

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Transition:
        """Raises `ConfigError` for anything but a half life of 1 to 1000000 tokens."""
        if not arguments:
            return cls()
        return cls(parse_number(cls.name, "the half life", ",".join(arguments), 1, 1e6))

    def predict(self, route: Route) -> Sequence[int]:
        """Return the likeliest to follow, up to twice as many as will be used."""
        ids = route.experts()
        stream = self._streams.of(route.stream)
        before, stream.layer, stream.ids = (stream.layer, stream.ids), route.layer, ids
        with self._lock:
            if before[0] is not None and len(before[1]) and len(ids):
                pairs = self._pairs.get((before[0], route.layer))
                if pairs is None:
                    pairs = self._pairs[before[0], route.layer] = _Pairs()
                # Of many tokens it isn't known which expert's token went where: it says less.
                weight = route.top_k / max(len(before[1]), len(ids), route.top_k)
                pairs.add(before[1], ids, weight, self._growth)
            following = self._pairs.get((route.layer, route.next_layer))
            if following is None or not len(ids):
                return ()
            scores = following.scores(ids)[: route.num_experts]
        return rank(scores, num_to_rank(route, len(ids)))


class _Stream:
    """A stream's last event."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.ids: Sequence[int] = ()


class _Pairs:
    """Decayed counts of (expert, expert of the next event). What is added grows instead."""

    def __init__(self) -> None:
        self._counts: Floats = np.zeros((0, 0), np.float32)
        self._totals: Floats = np.zeros(0, np.float32)
        self._unit = 1.0

    def add(self, before: Sequence[int], now: Sequence[int], weight: float, growth: float) -> None:
        self._unit *= growth
        if self._unit > _TOO_LARGE:
            self._counts /= self._unit
            self._totals /= self._unit
            self._unit = 1.0
        rows, columns = np.array(before), np.array(now)
        self._counts = grown(self._counts, int(rows.max()) + 1, int(columns.max()) + 1)
        self._totals = grown(self._totals, len(self._counts))
        self._counts[rows[:, None], columns] += self._unit * weight
        self._totals[rows] += self._unit * weight

    def scores(self, ids: Sequence[int]) -> Floats:
        known = np.array([i for i in ids if i < len(self._totals)], np.intp)
        # Those never seen have counted nothing.
        shares = 1 / np.maximum(self._totals[known], _SMALLEST)
        return np.asarray(shares @ self._counts[known], np.float32)

"""What a layer uses most."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from .base import Floats, Predictor, Route, grown, num_to_rank, parse_number, rank

_TOO_LARGE = 1e30  # of a float32


class Frequency(Predictor):
    """The experts with the highest decayed counts of use, layer by layer, over all streams.

    Args:
        half_life: Events of a layer after which a use counts half.
    """

    name = "frequency"
    summary = "the experts that the next layer has used most, recent uses counting more"
    source = "LFU with exponential ageing; expert popularity as in Lina (Li et al. 2023)"
    arguments = "[half life in tokens]"

    def __init__(self, half_life: float = 64) -> None:
        self._growth = 2 ** (1 / half_life)
        self._layers: dict[int, _Counts] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Frequency:
        """Raises `ConfigError` for anything but a half life of 1 to 1000000 tokens."""
        if not arguments:
            return cls()
        return cls(parse_number(cls.name, "the half life", ",".join(arguments), 1, 1e6))

    def predict(self, route: Route) -> Sequence[int]:
        """Return the next layer's most used, up to twice as many as will be used."""
        ids = route.experts()
        with self._lock:
            counts = self._layers.get(route.layer)
            if counts is None:
                counts = self._layers[route.layer] = _Counts()
            counts.add(ids, self._growth)
            following = self._layers.get(route.next_layer)
            if following is None:
                return ()
            return rank(following.counts[: route.num_experts], num_to_rank(route, len(ids)))


class _Counts:
    """Instead of all counts shrinking at each event, what is added grows."""

    def __init__(self) -> None:
        self.counts: Floats = np.zeros(0, np.float32)
        self._unit = 1.0

    def add(self, ids: Sequence[int], growth: float) -> None:
        if not len(ids):
            return
        self._unit *= growth
        if self._unit > _TOO_LARGE:
            self.counts /= self._unit
            self._unit = 1.0
        self.counts = grown(self.counts, max(ids) + 1)
        self.counts[ids] += self._unit

"""Tokens that used experts as this one does: a match of activation matrices."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .base import Floats, PerStream, Predictor, Route, grown, num_to_rank, parse_number, rank

_NUM_MATCHES = 8


class ActivationMatrices(Predictor):
    """Matches the experts that a token has used so far against those of tokens gone by.

    An activation matrix says, [layer, expert], what one pass through the layers used. The next
    layer's experts are ranked by what was used there in the passes most like the one under way,
    weighted by the cosine of the two. After the last layer it is what came after such passes.
    Where the collection is full, a pass takes the place of the one most like it, so that the
    collection stays diverse.

    MoE-Infinity's matrices are a request's. On recorded routes of one conversation those of a
    request predicted no better than counts of use (51 % of Qwen3-30B-A3B's experts in 2k guesses),
    those of a pass much better (76 %).

    No search is done: the products of all pairs of passes are kept, and an event adds to one row
    of them. Memory: capacity x layers x experts float32, and capacity squared float64.

    Args:
        capacity: Passes remembered, those under way too.
    """

    name = "eam"
    summary = "what was used there when the layers before used what they do now (EAM match)"
    source = "MoE-Infinity (Xue et al. 2024), arXiv 2401.14361"
    arguments = "[capacity in tokens]"

    def __init__(self, capacity: int = 256) -> None:
        self._passes = _Passes(capacity)
        self._streams: PerStream[_Stream] = PerStream(_Stream)
        self._lock = threading.Lock()

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> ActivationMatrices:
        """Raises `ConfigError` for anything but a capacity of 2 to 4096 tokens."""
        if not arguments:
            return cls()
        text = ",".join(arguments)
        return cls(int(parse_number(cls.name, "the capacity", text, 2, 4096, whole=True)))

    def predict(self, route: Route) -> Sequence[int]:
        """Return what the best matches used most, up to twice as many as will be used."""
        ids = route.experts()
        if not len(ids):
            return ()
        stream = self._streams.of(route.stream)
        first = stream.layer is None or route.layer <= stream.layer
        stream.layer = route.layer
        wraps = route.next_layer <= route.layer
        with self._lock:
            if first or self._passes.is_lost(stream):
                self._passes.begin(stream)
            # Of many tokens it isn't known which of them used what: it says less.
            weight = route.top_k / max(len(ids), route.top_k)
            self._passes.add(stream.row, route.layer, ids, weight)
            scores = self._passes.scores(stream.row, route.next_layer, after=wraps)
        return rank(scores[: route.num_experts], num_to_rank(route, len(ids)))


class _Stream:
    """A sequence, and where its pass stands."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.row = -1
        self.number = 0  # of the pass, of all that ever began


class _Passes:
    """Activation matrices, for each layer as columns of [experts, capacity]; all their products."""

    def __init__(self, capacity: int) -> None:
        self._used: dict[int, Floats] = {}
        self._nothing: Floats = np.zeros((0, capacity), np.float32)
        self._products = np.zeros((capacity, capacity))
        self._norms = np.zeros(capacity)
        self._numbers = np.zeros(capacity, np.int64)
        self._after = np.full(capacity, -1)  # the row of the pass that came next in its stream
        self._num_begun = 0

    def is_lost(self, stream: _Stream) -> bool:
        """Whether another pass has taken the row."""
        return bool(self._numbers[stream.row] != stream.number)

    def begin(self, stream: _Stream) -> None:
        """Give a stream's next pass a row."""
        before = -1 if stream.number == 0 or self.is_lost(stream) else stream.row
        row = self._free_row(before)
        for used in self._used.values():
            used[:, row] = 0
        self._products[row] = self._products[:, row] = 0
        self._norms[row] = 0
        self._after[self._after == row] = -1
        self._after[row] = -1
        if before >= 0:
            self._after[before] = row
        self._num_begun += 1
        self._numbers[row] = stream.number = self._num_begun
        stream.row = row

    def add(self, row: int, layer: int, ids: Sequence[int], weight: float) -> None:
        """Note the use of experts of one layer in a pass."""
        used = self._used.get(layer, self._nothing)
        used = self._used[layer] = grown(used, max(ids) + 1, used.shape[1])
        experts = np.array(ids)
        gained = weight * used[experts].sum(0, dtype=np.float64)
        used[experts, row] += weight
        # |a + b|^2 = |a|^2 + 2 ab + |b|^2
        square = self._products[row, row] + 2 * gained[row] + weight * weight * len(experts)
        self._products[row] += gained
        self._products[row, row] = square
        self._products[:, row] = self._products[row]
        self._norms[row] = square**0.5

    def scores(self, row: int, layer: int, after: bool) -> npt.NDArray[np.float64]:
        """Return how much a layer's experts were used in the passes most like `row`, or after."""
        likeness = self._likeness(row)
        num_matches = min(_NUM_MATCHES, len(likeness))
        best = likeness.argpartition(-num_matches)[-num_matches:]
        weights = likeness[best]
        if after:
            best = self._after[best]
            weights = np.where(best >= 0, weights, 0)
        used = self._used.get(layer, self._nothing)
        scores: npt.NDArray[np.float64] = used.take(best, 1) @ weights
        return scores

    def _likeness(self, row: int) -> npt.NDArray[np.float64]:
        """Return the cosine of a pass to every other one; 0 to itself."""
        products = self._products[row] / np.maximum(self._norms, 1e-9)
        products[row] = 0
        likeness: npt.NDArray[np.float64] = products / max(self._norms[row], 1e-9)
        return likeness

    def _free_row(self, ended: int) -> int:
        """An unused row, else that of the pass most like the one that has just ended."""
        if self._num_begun < len(self._numbers):
            return self._num_begun
        if ended < 0:
            return int(self._numbers.argmin())
        return int(self._likeness(ended).argmax())

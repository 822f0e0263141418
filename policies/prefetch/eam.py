"""Sequences that used experts as this one does: MoE-Infinity's activation matrices."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from .base import Floats, PerStream, Predictor, Route, num_to_rank, parse_number, rank

_NUM_MATCHES = 8
_CARRIED = 0.5  # of a matrix, into the next one of the same stream
_MAX_STREAMS = 256


class ActivationMatrices(Predictor):
    """Matches what a sequence has used so far against a collection of past activation matrices.

    A matrix counts, [layer, expert], what was used in up to `span` tokens of one stream; each
    stream's open matrix, too, is one of the collection. The next layer's experts are ranked by
    their counts there in the matrices of highest cosine similarity, weighted by it. Where the
    collection is full, the older one of the two most alike makes room, so that it stays diverse.

    MoE-Infinity compares whole requests. A chat is long and a machine's own user has few, so here
    a matrix ends after `span` tokens, or where a prompt comes, and passes half of it on.

    Similarities cost nothing to find: the products of all pairs are kept, and an event adds to
    one row of them. Memory: capacity x layers x experts float32, and capacity squared.

    Args:
        capacity: Matrices kept.
        span: Tokens counted in one.
    """

    name = "eam"
    summary = "what was used at this layer when the layers before were used alike (EAM match)"
    source = "MoE-Infinity (Xue et al. 2024), arXiv 2401.14361"
    arguments = "[capacity[,span in tokens]]"

    def __init__(self, capacity: int = 64, span: int = 32) -> None:
        self._span = span
        self._collection = _Collection(capacity)
        self._streams: PerStream[_Stream] = PerStream(_Stream, min(_MAX_STREAMS, capacity))
        self._lock = threading.Lock()

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> ActivationMatrices:
        """Raises `ConfigError` for anything but a capacity of 2 to 4096 and a span of 1 to 1e6."""
        limits = (("the capacity", 2, 4096), ("the span", 1, 1e6), ("a third argument", 1, 0))
        numbers = [
            int(parse_number(cls.name, what, text, low, high, whole=True))
            for text, (what, low, high) in zip(arguments[:3], limits, strict=False)
        ]
        return cls(*numbers)

    def predict(self, route: Route) -> Sequence[int]:
        """Return what the best matches used most, up to twice as many as will be used."""
        ids = route.experts()
        if not len(ids):
            return ()
        stream = self._streams.of(route.stream)
        with self._lock:
            row = self._row_of(stream, route, len(ids))
            columns = self._collection.columns(route.layer, max(max(ids) + 1, route.num_experts))
            weight = route.top_k / max(len(ids), route.top_k)
            self._collection.add(row, columns.start, ids, weight)
            following = self._collection.columns(route.next_layer, route.num_experts)
            scores = self._collection.scores(row, following)[: route.num_experts]
        return rank(scores, num_to_rank(route, len(ids)))

    def _row_of(self, stream: _Stream, route: Route, num_used: int) -> int:
        """Return the row of the stream's open matrix, a new one where a span or a prompt begins."""
        is_prompt = num_used > route.top_k
        begins = stream.first_layer is None or route.layer == stream.first_layer
        if begins:
            stream.num_tokens += 1
        new_text = begins and is_prompt and not stream.in_prompt
        if begins:
            stream.in_prompt = is_prompt
        row = self._collection.row_of(stream)
        if row is None or new_text or (begins and stream.num_tokens > self._span):
            carried = row if not new_text else None
            row = self._collection.open_row(stream, carried)
            stream.num_tokens = 1
        if stream.first_layer is None or route.layer < stream.first_layer:
            stream.first_layer = route.layer
        return row


class _Stream:
    """A sequence whose open matrix is a row of the collection, as long as that row is its own."""

    def __init__(self) -> None:
        self.first_layer: int | None = None
        self.num_tokens = 0
        self.in_prompt = True
        self.row: int | None = None


class _Collection:
    """Matrices as columns of [layers x experts, capacity], and the products of all pairs."""

    def __init__(self, capacity: int) -> None:
        self._counts: Floats = np.zeros((0, capacity), np.float32)
        self._products = np.zeros((capacity, capacity))
        self._norms = np.zeros(capacity)
        self._ages = np.zeros(capacity, np.int64)
        self._owners: list[_Stream | None] = [None] * capacity
        self._columns: dict[int, slice] = {}
        self._num_opened = 0

    def columns(self, layer: int, num_experts: int) -> slice:
        """Return where a layer's experts stand."""
        found = self._columns.get(layer)
        if found is None:
            start = len(self._counts)
            more = np.zeros((num_experts, self._counts.shape[1]), np.float32)
            self._counts = np.concatenate([self._counts, more])
            found = self._columns[layer] = slice(start, start + num_experts)
        return found

    def row_of(self, stream: _Stream) -> int | None:
        row = stream.row
        return row if row is not None and self._owners[row] is stream else None

    def open_row(self, stream: _Stream, carried: int | None) -> int:
        """Give a stream a new row, which begins as a part of `carried`."""
        row = self._victim(carried)
        self._counts[:, row] = 0 if carried is None else self._counts[:, carried] * _CARRIED
        products = self._counts[:, row] @ self._counts
        self._products[row] = self._products[:, row] = products
        self._norms[row] = np.sqrt(products[row])
        self._num_opened += 1
        self._ages[row] = self._num_opened
        self._owners[row], stream.row = stream, row
        if carried is not None:
            self._owners[carried] = None
        return row

    def add(self, row: int, start: int, ids: Sequence[int], weight: float) -> None:
        """Count one use more of each expert in a row."""
        places = np.asarray(ids) + start
        gained = weight * self._counts[places].sum(0, dtype=np.float64)
        self._counts[places, row] += weight
        # |a + b|^2 = |a|^2 + 2 ab + |b|^2
        squared = self._products[row, row] + 2 * gained[row] + weight * weight * len(places)
        self._products[row] += gained
        self._products[:, row] = self._products[row]
        self._products[row, row] = squared
        self._norms[row] = squared**0.5

    def scores(self, row: int, columns: slice) -> Floats:
        """Return the counts in these columns of the matrices most like `row`, itself too."""
        norms = self._norms * self._norms[row]
        likeness = np.divide(self._products[row], norms, out=np.zeros_like(norms), where=norms > 0)
        best = likeness.argsort(kind="stable")[-_NUM_MATCHES:]
        weights = likeness[best] / np.maximum(self._norms[best], 1e-9)
        scores: Floats = self._counts[columns][:, best] @ weights.astype(np.float32)
        return scores

    def _victim(self, carried: int | None) -> int:
        """An unused row, else the older of the two most alike."""
        if self._num_opened < len(self._ages):
            return self._num_opened
        norms = np.outer(self._norms, self._norms)
        likeness = np.divide(self._products, norms, out=np.zeros_like(norms), where=norms > 0)
        np.fill_diagonal(likeness, -1)
        for row in [carried] if carried is not None else []:
            likeness[row] = likeness[:, row] = -1
        one, other = divmod(int(likeness.argmax()), len(norms))
        return one if self._ages[one] < self._ages[other] else other

"""Layers that route by token id: known as soon as the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Predictor, Route

TABLE = "tid2eid"
"""The buffer of a hash router: [vocabulary, k] expert ids of each token id."""


class HashExact(Predictor):
    """Exact hints for layers with a token-to-expert table (the first ones of DeepSeek-V4)."""

    name = "hash-exact"
    summary = "exact for layers that route by token id, nothing for the others"
    source = "hash routing: Roller et al. 2021; DeepSeek-V4's tid2eid tables"
    follows_routes = False
    learns = False

    def predict(self, route: Route) -> Sequence[int]:
        """Return nothing: tables are looked up when the tokens come, before any route."""
        return ()


def hashed_experts(table: Any, input_ids: Any) -> list[int]:
    """Return the experts that a hash router will use, distinct, the most used first.

    Args:
        table: integer tensor [vocabulary, k].
        input_ids: integer tensor of any shape; all its tokens are routed, padding too.
    """
    counts = table[input_ids.reshape(-1)].reshape(-1).long().bincount()
    num_used = int((counts > 0).sum())
    ranked: list[int] = counts.argsort(descending=True)[:num_used].tolist()
    return ranked

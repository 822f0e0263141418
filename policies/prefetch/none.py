"""No prefetch at all."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Predictor, Route


class NoPrefetch(Predictor):
    """Moves a block only when an event needs it."""

    name = "none"
    summary = "no prefetch: every block moves on demand"
    source = "the baseline"
    uses_tables = False
    follows_routes = False
    learns = False

    def predict(self, route: Route) -> Sequence[int]:
        """Return nothing."""
        return ()

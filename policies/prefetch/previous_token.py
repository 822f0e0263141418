"""What the previous token used."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .base import Predictor, Route


class PreviousToken(Predictor):
    """The next layer's experts of the previous token: this thread's last event of that layer."""

    name = "previous-token"
    summary = "the experts that the next layer used for the previous token"
    source = "temporal locality of routes, as measured in Mixtral (Jiang et al. 2024)"

    def __init__(self) -> None:
        self._thread = threading.local()

    def predict(self, route: Route) -> Sequence[int]:
        """Return what the next layer used last."""
        used: dict[int, Sequence[int]] | None = getattr(self._thread, "used", None)
        if used is None:
            used = self._thread.used = {}
        used[route.layer] = route.experts()
        # A model of one layer predicts that layer, from what it has just used.
        return used.get(route.next_layer, ())

"""What the previous token used."""

from __future__ import annotations

from collections.abc import Sequence

from .base import PerStream, Predictor, Route


class PreviousToken(Predictor):
    """The next layer's experts of the previous token: this stream's last event of that layer."""

    name = "previous-token"
    summary = "the experts that the next layer used for the previous token"
    source = "temporal locality of routes, as measured in Mixtral (Jiang et al. 2024)"

    def __init__(self) -> None:
        self._used: PerStream[dict[int, Sequence[int]]] = PerStream(dict)

    def predict(self, route: Route) -> Sequence[int]:
        """Return what the next layer used last."""
        used = self._used.of(route.stream)
        used[route.layer] = route.experts()
        # A model of one layer predicts that layer, from what it has just used.
        return used.get(route.next_layer, ())

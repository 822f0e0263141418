"""The next layer's own gate, applied one layer early."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Predictor, Route


class NextGate(Predictor):
    """Layer l+1's norm and gate on the residual stream that enters layer l's experts.

    A layer adds little to the residual stream, so the next gate mostly sees now what it will see
    then. Up to 2k experts of a top-k router are ranked; the runtime judges which
    ranks pay.
    """

    name = "next-gate"
    summary = "the next layer's norm and gate on this layer's residual stream, up to 2k of top-k"
    source = "Eliseev and Mazur 2023 (speculative expert loading); FATE 2025 (cross-layer gates)"
    looks_ahead = True
    learns = False

    def predict(self, route: Route) -> Sequence[int]:
        """Return the next layer's top 2k by its gate."""
        return route.look_ahead()

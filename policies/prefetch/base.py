"""What a prefetch predictor is: it ranks, and moves nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol


class Route(Protocol):
    """What a router has just decided, and what may be asked about the layer after it.

    Everything is computed when it is asked for, so a predictor pays only for what it uses.
    """

    @property
    def layer(self) -> int:
        """The layer whose router has spoken."""

    @property
    def next_layer(self) -> int:
        """The layer to predict. After the last layer it is the first one, of the next token."""

    def experts(self) -> Sequence[int]:
        """Return the experts that this layer now uses, distinct, the most used first."""

    def look_ahead(self) -> Sequence[int]:
        """Return the next layer's experts by its own gate on this layer's residual, ranked.

        Up to twice as many as a token uses. Empty where that layer's gate can't be run alone.
        """


class Predictor(ABC):
    """Turns routes into ranked guesses. One object serves every thread of a model."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    """Where the algorithm comes from."""
    uses_tables: ClassVar[bool] = True
    """Whether layers that route by token id are predicted exactly, whatever else it does."""
    follows_routes: ClassVar[bool] = True
    """Whether `predict` ever says anything."""
    looks_ahead: ClassVar[bool] = False
    """Whether it calls `Route.look_ahead`."""

    @abstractmethod
    def predict(self, route: Route) -> Sequence[int]:
        """Return expert ids for the next event of `route.next_layer` in this thread.

        Distinct, the likeliest first; empty says nothing. Called in the thread that generates,
        once for each layer step, right after the step's own loads were started.
        """

"""What a prefetch predictor is: it ranks, and moves nothing."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tiered_mem.errors import ConfigError

Floats = npt.NDArray[np.float32]
State = TypeVar("State")


class Route(Protocol):
    """What a router has just decided, and what may be asked about the layer after it.

    Everything is computed when it is asked for, so a predictor pays only for what it uses.
    """

    @property
    def stream(self) -> int:
        """Which sequence of events this is: a thread's in a runtime, a sequence's in a trace."""

    @property
    def layer(self) -> int:
        """The layer whose router has spoken."""

    @property
    def next_layer(self) -> int:
        """The layer to predict. After the last layer it is the first one, of the next token."""

    @property
    def num_experts(self) -> int:
        """How many experts the next layer has: ids from 0 to one less."""

    @property
    def top_k(self) -> int:
        """How many experts a token uses."""

    def experts(self) -> Sequence[int]:
        """Return the experts that this layer now uses, distinct, the most used first.

        More than `top_k` in an event of many tokens: a prompt's, or a batch's.
        """

    def look_ahead(self) -> Sequence[int]:
        """Return the next layer's experts by its own gate on this layer's residual, ranked.

        Up to twice as many as a token uses. Empty where that layer's gate can't be run alone.
        """

    def residual(self) -> Floats | None:
        """Return the residual stream [hidden] that this layer's router saw, of the last token.

        None where it isn't known.
        """


class Decision(NamedTuple):
    """A `Route` of plain values: of a trace, of a test."""

    layer: int
    next_layer: int
    ids: Sequence[int]
    num_experts: int
    top_k: int
    stream: int = 0
    ahead: Sequence[int] = ()
    state: Floats | None = None

    def experts(self) -> Sequence[int]:
        return self.ids

    def look_ahead(self) -> Sequence[int]:
        return self.ahead

    def residual(self) -> Floats | None:
        return self.state


class ModelInfo(NamedTuple):
    """The model that a predictor is to serve. `hidden_size` is 0 if unknown."""

    name: str
    num_experts: int
    hidden_size: int = 0


class Predictor(ABC):
    """Turns routes into ranked guesses. One object serves every thread of a model."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    """Where the algorithm comes from."""
    arguments: ClassVar[str] = ""
    """What may stand in parentheses after the name, such as "PATH" or "[half life]"."""
    uses_tables: ClassVar[bool] = True
    """Whether layers that route by token id are predicted exactly, whatever else it does."""
    follows_routes: ClassVar[bool] = True
    """Whether `predict` ever says anything."""
    looks_ahead: ClassVar[bool] = False
    """Whether it calls `Route.look_ahead`."""
    uses_residual: ClassVar[bool] = False
    """Whether it calls `Route.residual`."""
    learns: ClassVar[bool] = True
    """Whether `predict` learns from what it is shown: then it is called even where a guess can't
    help, so that it misses nothing."""
    simulator_only: ClassVar[bool] = False
    """Whether it knows what only a recorded trace can tell."""

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Predictor:
        """Return a new one, as `name(argument,...)` asks for.

        Raises `ConfigError` for arguments that it doesn't take.
        """
        if arguments:
            raise ConfigError(f"prefetch={cls.name!r} takes no arguments: write it without ( )")
        return cls()

    def check(self, model: ModelInfo) -> None:  # noqa: B027  # most can serve any
        """Called before any route. Raises `ConfigError` if it can't serve this model."""

    @abstractmethod
    def predict(self, route: Route) -> Sequence[int]:
        """Return expert ids for the next event of `route.next_layer` in this stream.

        Distinct, the likeliest first; empty says nothing. Called in the thread that generates,
        once for each layer step, right after the step's own loads were started.
        """


class PerStream(Generic[State]):
    """State of its own for every stream. The one that was silent for longest is forgotten.

    Safe to share between threads; the state itself is only its stream's.
    """

    def __init__(self, make: Callable[[], State], limit: int = 256) -> None:
        self._make, self._limit = make, limit
        self._states: OrderedDict[int, State] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    def of(self, stream: int) -> State:
        """Return the state of a stream, new if it has none."""
        with self._lock:
            state = self._states.get(stream)
            if state is None:
                if len(self._states) >= self._limit:
                    self._states.popitem(last=False)
                state = self._states[stream] = self._make()
            else:
                self._states.move_to_end(stream)
            return state


def num_to_rank(route: Route, num_used: int) -> int:
    """Return how many experts to rank: twice as many as the event ahead will use.

    That is as many as this one uses, but for the next token, which comes alone.
    """
    same_tokens = route.next_layer > route.layer
    return min(route.num_experts, 2 * (max(num_used, route.top_k) if same_tokens else route.top_k))


def rank(scores: npt.NDArray[Any], most: int) -> list[int]:
    """Return the ids of at most `most` positive scores, the highest first, then by id."""
    order = (-scores).argsort(kind="stable")[:most]
    ranked: list[int] = order[: np.count_nonzero(scores[order] > 0)].tolist()  # zeros come last
    return ranked


def grown(array: Floats, *shape: int) -> Floats:
    """Return `array` [n] or [n, m], in a larger one of zeros if it hasn't at least this shape."""
    if array.shape[0] >= shape[0] and array.shape[-1] >= shape[-1]:
        return array
    larger = np.zeros([max(pair) for pair in zip(array.shape, shape, strict=True)], array.dtype)
    larger[tuple(slice(have) for have in array.shape)] = array
    return larger


def parse_number(
    predictor: str, what: str, text: str, low: float, high: float, whole: bool = False
) -> float:
    """Return a predictor's argument as a number. Raises `ConfigError` unless low <= it <= high."""
    try:
        number = float(text)
        if low <= number <= high and not (whole and number != int(number)):
            return number
    except ValueError:
        pass
    raise ConfigError(
        f"prefetch={predictor!r}: {what} is {text.strip()!r}; it must be a "
        f"{'whole ' if whole else ''}number from {low:g} to {high:g}"
    )

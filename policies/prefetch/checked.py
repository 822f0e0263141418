"""Stands between a predictor from elsewhere and whoever asks it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from tiered_mem.errors import PolicyError, TieredMemError

from .base import ModelInfo, Predictor, Route

_FLAGS = (
    "uses_tables",
    "follows_routes",
    "looks_ahead",
    "uses_residual",
    "learns",
    "simulator_only",
)


class Checked(Predictor):
    """A predictor that isn't ours, its answers checked.

    Args:
        predictor: What to ask.
        who: What to call it in a message.
    """

    name = "checked"
    summary = "another package's predictor, its answers checked"
    source = "tiered-mem"

    def __init__(self, predictor: Predictor, who: str) -> None:
        self.inner, self._who = predictor, who
        # They are a class's, but of this class every object stands for another one.
        names: dict[str, Any] = {flag: getattr(predictor, flag) for flag in _FLAGS}
        names["name"] = str(getattr(predictor, "name", type(predictor).__name__))
        self.__dict__.update(names)

    def check(self, model: ModelInfo) -> None:
        """Raises `PolicyError`, naming the plug-in, unless it refuses by a named error itself."""
        try:
            self.inner.check(model)
        except TieredMemError:
            raise
        except Exception as error:
            raise PolicyError(f"{self._who} raised {error!r} in check()") from error

    def predict(self, route: Route) -> Sequence[int]:
        """Raises `PolicyError`, naming the plug-in, if it raises or names what can't be."""
        try:
            answer = self.inner.predict(route)
        except Exception as error:
            raise PolicyError(
                f"{self._who} raised {error!r} when asked for layer {route.next_layer}"
            ) from error
        return self._checked(answer, route)

    def _checked(self, answer: Any, route: Route) -> list[int]:
        try:
            ids = [operator.index(index) for index in answer]
        except TypeError:
            raise self._refuse(answer, "a sequence of integers is wanted", route) from None
        if ids and not 0 <= min(ids) <= max(ids) < route.num_experts:
            known = f"experts are 0 to {route.num_experts - 1}"
            raise self._refuse(answer, known, route)
        if len(set(ids)) < len(ids):
            raise self._refuse(answer, "some are named twice", route)
        return ids

    def _refuse(self, answer: Any, why: str, route: Route) -> PolicyError:
        text = repr(answer)
        shown = text if len(text) <= 80 else text[:77] + "..."
        return PolicyError(f"{self._who} predicted {shown} for layer {route.next_layer}: {why}")

"""Prefetch predictors, one a file: each ranks the experts of a layer to come and moves nothing.

To add one: a file with a `Predictor` subclass, and its class in `_PREDICTORS` below.
"""

from __future__ import annotations

from typing import NamedTuple

from tiered_mem.errors import ConfigError

from .base import Predictor, Route
from .hash_exact import HashExact
from .next_gate import NextGate
from .none import NoPrefetch
from .previous_token import PreviousToken

__all__ = ["Predictor", "PredictorInfo", "Route", "list_predictors", "make_predictor"]

_PREDICTORS: dict[str, type[Predictor]] = {
    predictor.name: predictor for predictor in (NoPrefetch, NextGate, PreviousToken, HashExact)
}


class PredictorInfo(NamedTuple):
    """A predictor's name, what it does in a line, and where it comes from."""

    name: str
    summary: str
    source: str


def make_predictor(predictor: str | Predictor) -> Predictor:
    """Return a new predictor of that name; a predictor is returned as it is.

    Raises `ConfigError`, naming the choices, if there is none such.
    """
    if isinstance(predictor, Predictor):
        return predictor
    if predictor not in _PREDICTORS:
        raise ConfigError(
            f"prefetch={predictor!r} is no predictor; "
            f"choose one of {', '.join(sorted(_PREDICTORS))}, or give a Predictor"
        )
    return _PREDICTORS[predictor]()


def list_predictors() -> list[PredictorInfo]:
    """Return all predictors that `make_predictor` knows."""
    return [PredictorInfo(p.name, p.summary, p.source) for p in _PREDICTORS.values()]

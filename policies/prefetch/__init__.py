"""Prefetch predictors, one a file: each ranks the experts of a layer to come and moves nothing.

To add one: a file with a `Predictor` subclass, and its class in `BUILT_INS` below. Other packages
add theirs by an entry point, see `tiered_mem.plugins`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tiered_mem.errors import ConfigError, PolicyError, TieredMemError

from .base import Decision, ModelInfo, Predictor, Route
from .checked import Checked
from .eam import ActivationMatrices
from .frequency import Frequency
from .hash_exact import HashExact
from .learned import Learned
from .next_gate import NextGate
from .none import NoPrefetch
from .oracle import Oracle
from .previous_token import PreviousToken
from .transition import Transition

__all__ = [
    "BUILT_INS",
    "Decision",
    "ModelInfo",
    "Oracle",
    "Predictor",
    "PredictorInfo",
    "Route",
    "list_predictors",
    "make_predictor",
]

BUILT_INS: dict[str, type[Predictor]] = {
    predictor.name: predictor
    for predictor in (
        NoPrefetch,
        NextGate,
        PreviousToken,
        Frequency,
        Transition,
        ActivationMatrices,
        HashExact,
        Learned,
        Oracle,
    )
}

_SPEC = re.compile(r"([\w.+-]+)\s*(?:\((.*)\))?")


class PredictorInfo(NamedTuple):
    """A predictor's name with its arguments, what it does in a line, and where it comes from."""

    name: str
    summary: str
    source: str


def make_predictor(predictor: str | Predictor, *, simulator: bool = False) -> Predictor:
    """Return a new predictor: "name" or "name(argument,...)", or an object of one's own.

    Names are those of built-ins, then those of plug-ins. The answers of a predictor that isn't
    ours are checked.

    Args:
        predictor: what is wanted.
        simulator: there is a recorded trace, so that the oracle can be used.

    Raises:
        ConfigError: there is none of that name (the choices are named), or not with these
            arguments, or only in the simulator.
        PolicyError: a plug-in of that name can't be used.
    """
    if isinstance(predictor, Checked):
        return predictor
    if isinstance(predictor, Predictor):
        made, who = predictor, f"predictor {type(predictor).__name__!r}"
    else:
        made, who = _from_spec(predictor)
    if made.simulator_only and not simulator:
        raise ConfigError(
            f"prefetch={made.name!r} knows a recorded trace's future: it works in the simulator "
            "alone (tiered-mem compare), not with a running model"
        )
    return made if type(made) in BUILT_INS.values() else Checked(made, who)


def list_predictors() -> list[PredictorInfo]:
    """Return all built-in predictors that `make_predictor` knows."""
    return [
        PredictorInfo(p.name + (f"({p.arguments})" if p.arguments else ""), p.summary, p.source)
        for p in BUILT_INS.values()
    ]


def _from_spec(spec: str) -> tuple[Predictor, str]:
    """Return the predictor that a spec asks for, and what to call it in a message."""
    match = _SPEC.fullmatch(spec.strip()) if isinstance(spec, str) else None
    if match is None:
        raise ConfigError(
            f"prefetch={spec!r} is no predictor; write name or name(argument,...), with one of "
            + _choices([])
        )
    name, inside = match[1], (match[2] or "").strip()
    arguments = inside.split(",") if inside else []
    if name in BUILT_INS:
        return BUILT_INS[name].from_arguments(arguments), name
    return _from_plugin(name, arguments, spec)


def _from_plugin(name: str, arguments: list[str], spec: str) -> tuple[Predictor, str]:
    from tiered_mem import plugins  # reads the installed packages, for names that aren't built in

    others = plugins.names()
    if name not in others:
        raise ConfigError(f"prefetch={spec!r} is no predictor; choose one of {_choices(others)}")
    found: type[Predictor] = plugins.load(name, "prefetch")
    who = plugins.describe(name)
    try:
        made: object = found.from_arguments(arguments)
    except TieredMemError:
        raise
    except Exception as error:
        raise PolicyError(f"{who} raised {error!r} when it was made") from error
    if not isinstance(made, Predictor):
        raise PolicyError(f"{who} made {made!r}, which is no Predictor")
    return made, who


def _choices(others: Sequence[str]) -> str:
    return f"{', '.join(sorted([*BUILT_INS, *others]))}, or give a Predictor"

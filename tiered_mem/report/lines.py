"""The lines of a plot: which runs belong together, which stand out, and how they look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_LINES = 8
"""More can't be told apart; the bounds come on top."""


@dataclass(frozen=True, eq=False)
class Line:
    """The runs of one eviction policy with one predictor on a trace, by growing budget."""

    eviction: str
    prefetch: str
    runs: tuple[dict[str, Any], ...]

    @property
    def label(self) -> str:
        return combination(self.eviction, self.prefetch)


def combination(eviction: str, prefetch: str) -> str:
    """Return what people read for a policy and a predictor."""
    return eviction if prefetch == "none" else f"{eviction} + {prefetch}"


def group_lines(runs: Iterable[dict[str, Any]]) -> list[Line]:
    """Group one trace's runs into lines, in the order of the runs."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["eviction"], run["prefetch"]), []).append(run)
    return [
        Line(eviction, prefetch, tuple(sorted(group, key=lambda run: run["hbm_nbytes"])))
        for (eviction, prefetch), group in groups.items()
    ]


def choose_lines(lines: Sequence[Line], most: int = MAX_LINES) -> list[Line]:
    """Return the lines that stand out, in the order given.

    All, if they are few. Else plain lru, the best of each predictor, then its second best, and so
    on: by stall, budgets counting alike.
    """
    if len(lines) <= most:
        return list(lines)
    ranked = sorted(lines, key=_scores(lines).__getitem__)
    by_predictor: dict[str, list[Line]] = {}
    for line in ranked:
        by_predictor.setdefault(line.prefetch, []).append(line)
    rounds = [line for place in _rounds(list(by_predictor.values())) for line in place]
    baseline = [line for line in lines if (line.eviction, line.prefetch) == ("lru", "none")]
    chosen = set(list(dict.fromkeys([*baseline, *rounds]))[:most])
    return [line for line in lines if line in chosen]


def _rounds(ranks: Sequence[Sequence[Line]]) -> list[list[Line]]:
    longest = max(len(rank) for rank in ranks)
    return [[rank[i] for rank in ranks if i < len(rank)] for i in range(longest)]


def _scores(lines: Sequence[Line]) -> dict[Line, tuple[float, float]]:
    """Return the mean share of the worst stall at a budget, and of its misses for a tie."""
    worst: dict[tuple[int, str], float] = {}
    for line in lines:
        for run in line.runs:
            for name in ("stall_seconds", "num_misses"):
                place = (run["hbm_nbytes"], name)
                worst[place] = max(worst.get(place, 0.0), run[name])

    def score(line: Line, name: str) -> float:
        shares: list[float] = [
            run[name] / (worst[run["hbm_nbytes"], name] or 1) for run in line.runs
        ]
        return sum(shares) / len(shares)

    return {line: (score(line, "stall_seconds"), score(line, "num_misses")) for line in lines}

"""The plots: miss ratio and stall against the budget, a pair for each trace, light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator, PercentFormatter

from tiered_mem.config import format_size
from tiered_mem.report.lines import Line, choose_lines, group_lines

Value = Callable[[dict[str, Any]], float | None]

_MARKERS = "osD^vPX*"
# By predictor, in the order they come; none is solid.
_DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (3, 3)),
    (0, (8, 1.5, 1.2, 1.5, 1.2, 1.5)),
    (0, (10, 3)),
    (0, (1.2, 3)),
)
_LOG_FROM = 12  # budgets this many times apart need a logarithmic axis
_MOST_TICKS = 8


@dataclass(frozen=True)
class Plot:
    """A plot of one trace as PNG files for light and dark pages. `text` says what it shows."""

    trace: str
    file_name: str
    text: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class _Theme:
    """Colours that people with colour-blindness can tell apart (after Okabe and Ito 2008)."""

    paper: str
    ink: str
    faint: str
    lines: tuple[str, ...]


_LIGHT = _Theme(
    "#ffffff",
    "#1f2328",
    "#c9ced6",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3294", "#8c6d31"),
)
_DARK = _Theme(
    "#16191f",
    "#e6e8eb",
    "#4a515c",
    ("#4fa8e8", "#ff8a4c", "#2bc79a", "#e79bc7", "#f2b93b", "#9adbf7", "#b48ae0", "#c9a86a"),
)


@dataclass(frozen=True)
class _Metric:
    """What is drawn over the budgets, and the bounds beside it: (label, dashes, value)."""

    name: str
    title: str
    axis: str
    value: Value
    bounds: tuple[tuple[str, Any, Value], ...]


def miss_ratio(run: dict[str, Any]) -> float:
    """Return the share of a run's accesses that missed."""
    return float(run["num_misses"] / max(1, run["num_accesses"]))


def per_token(run: dict[str, Any], seconds: float) -> float:
    """Return `seconds` of a whole run by token."""
    return seconds / max(1, int(run["num_tokens"]))


def _bound_ratio(name: str) -> Value:
    return lambda run: run["bounds"][name] / max(1, run["num_accesses"])


def demand_stall(run: dict[str, Any]) -> float | None:
    """Return Belady's stall per token: of HBM alone, so none where DRAM is behind it."""
    return None if run["dram_nbytes"] else per_token(run, run["bounds"]["stall_seconds_demand"])


def least_stall(run: dict[str, Any]) -> float | None:
    """Return the stall per token that no run can be below."""
    return per_token(run, run["bounds"]["stall_seconds_lower"])


_METRICS = (
    _Metric(
        "miss-ratio",
        "misses",
        "share of accesses that miss HBM",
        miss_ratio,
        (
            ("Belady on demand", (0, (1, 1.5)), _bound_ratio("num_misses_forced")),
            ("Belady with bypass", "solid", _bound_ratio("num_misses_bypass")),
        ),
    ),
    _Metric(
        "stall",
        "stall",
        "stall per token",
        lambda run: per_token(run, run["stall_seconds"]),
        (
            ("Belady on demand", (0, (1, 1.5)), demand_stall),
            ("lower bound with prefetch", "solid", least_stall),
        ),
    ),
)


def draw_plots(results: dict[str, Any]) -> list[Plot]:
    """Draw a plot of each metric for each trace."""
    plots = []
    predictors = list(dict.fromkeys(["none", *(run["prefetch"] for run in results["runs"])]))
    for number, trace in enumerate(results["traces"], 1):
        lines = group_lines(run for run in results["runs"] if run["trace"] == trace["name"])
        chosen = choose_lines(lines)
        for metric in _METRICS:
            picture = _Picture(trace, metric, lines, chosen, predictors)
            safe = re.sub(r"[^A-Za-z0-9._-]+", "-", trace["name"])[:60].strip(".-")
            plots.append(
                Plot(
                    trace=trace["name"],
                    file_name=f"{number}-{safe or 'trace'}-{metric.name}.png",
                    text=f"{metric.axis} against the HBM budget for {trace['name']}; "
                    "the same figures are in the table of all runs",
                    light=picture.draw(_LIGHT),
                    dark=picture.draw(_DARK),
                )
            )
    return plots


@dataclass(frozen=True)
class _Picture:
    trace: dict[str, Any]
    metric: _Metric
    lines: Sequence[Line]
    chosen: Sequence[Line]
    predictors: Sequence[str]

    def draw(self, theme: _Theme) -> bytes:
        # Names come from files: they are no formulas, and may hold letters that the font lacks.
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")
            figure = Figure(figsize=(6, 5.2), dpi=160, layout="constrained", facecolor=theme.paper)
            axes = figure.add_subplot()
            self._dress(axes, theme)
            handles = self._draw_lines(axes, theme)
            axes.set_ylim(bottom=0)
            labels = [label for label, _ in handles]
            figure.legend(
                [handle for _, handle in handles],
                labels,
                loc="outside lower center",
                ncols=1 if max(map(len, labels)) > 38 else 2,
                frameon=False,
                labelcolor=theme.ink,
                handlelength=3.4,
            )
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": "tiered-mem"})
        return buffer.getvalue()

    def _dress(self, axes: Axes, theme: _Theme) -> None:
        name = self.trace["name"]
        name = name if len(name) <= 48 else name[:47] + "…"
        axes.set_title(f"{name}: {self.metric.title}", loc="left", color=theme.ink)
        axes.set_facecolor(theme.paper)
        axes.set_ylabel(self.metric.axis, color=theme.ink)
        axes.set_xlabel("HBM budget, share of the blocks' bytes", color=theme.ink)
        axes.tick_params(colors=theme.ink)
        axes.grid(axis="y", color=theme.faint, linewidth=0.5, alpha=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
        if self.metric.name == "miss-ratio":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        else:
            axes.yaxis.set_major_formatter(EngFormatter("s"))
        axes.margins(x=0.08)
        self._set_ticks(axes)

    def _set_ticks(self, axes: Axes) -> None:
        budgets = sorted({run["hbm_nbytes"] for line in self.lines for run in line.runs})
        shares = [self._share(nbytes) for nbytes in budgets]
        if shares[-1] > _LOG_FROM * shares[0]:
            axes.set_xscale("log")
        if len(budgets) > _MOST_TICKS:
            axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
            return
        axes.xaxis.set_major_locator(FixedLocator(shares))
        axes.xaxis.set_minor_locator(NullLocator())
        texts = [f"{s:.3g} %\n{format_size(n)}" for s, n in zip(shares, budgets, strict=True)]
        axes.set_xticklabels(texts)
        if len(shares) == 1:
            axes.set_xlim(0, 2 * shares[0])

    def _share(self, nbytes: int) -> float:
        return float(100 * nbytes / self.trace["nbytes"])

    def _draw_lines(self, axes: Axes, theme: _Theme) -> list[tuple[str, Any]]:
        """Draw all lines, faint ones first. Returns (label, handle) for the legend."""
        handles: list[tuple[str, Any]] = []
        faint = [line for line in self.lines if line not in self.chosen]
        for line in faint:
            xs, ys = self._points(line.runs, self.metric.value)
            artists = axes.plot(xs, ys, color=theme.faint, linewidth=0.9, marker=".", zorder=1)
            if line is faint[-1]:
                handles.append((f"{len(faint)} others", artists[0]))
        chosen: list[tuple[str, Any]] = []
        for i, line in enumerate(self.chosen):
            xs, ys = self._points(line.runs, self.metric.value)
            artists = axes.plot(
                xs,
                ys,
                color=theme.lines[i % len(theme.lines)],
                marker=_MARKERS[i % len(_MARKERS)],
                markeredgecolor=theme.paper,
                markersize=7,
                linewidth=1.8,
                linestyle=_DASHES[self.predictors.index(line.prefetch) % len(_DASHES)],
                zorder=3,
            )
            chosen.append((line.label, artists[0]))
        # Every run of a budget carries the same bounds.
        by_budget = {run["hbm_nbytes"]: run for line in self.lines for run in line.runs}
        runs = [by_budget[nbytes] for nbytes in sorted(by_budget)]
        bounds: list[tuple[str, Any]] = []
        for label, dashes, value in self.metric.bounds:
            xs, ys = self._points(runs, value)
            style: dict[str, Any] = {"color": theme.ink, "linestyle": dashes, "linewidth": 1.6}
            if len(xs) == 1:
                bounds.append((label, axes.axhline(ys[0], zorder=2, **style)))
            elif xs:
                bounds.append((label, axes.plot(xs, ys, marker="_", zorder=2, **style)[0]))
        return [*chosen, *handles, *bounds]

    def _points(
        self, runs: Iterable[dict[str, Any]], value: Value
    ) -> tuple[list[float], list[float]]:
        found = [(self._share(run["hbm_nbytes"]), value(run)) for run in runs]
        points = [(x, y) for x, y in found if y is not None]
        return [x for x, _ in points], [y for _, y in points]

"""Every eviction policy with every predictor, simulated over traces, and the default among them.

Budgets are 10, 25 and 50 % of the bytes of the model's experts. Bounds stand beside the runs: what
Belady's MIN misses on demand, and the least stall of any prefetcher on the same links. Every figure
is a count of the simulator, the same on any machine; its speed isn't measured.

    python benchmarks/bench_policies.py [TRACE.npz ...] [--default POLICY] [--smoke]
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import common
import route_grid

from tiered_mem.compare import AUTO
from tiered_mem.compare_options import DEFAULT_COMPUTE
from tiered_mem.policy import list_policies
from tiered_mem.runtime import Runtime
from tiered_mem.trace import Form, Trace

NVME = "3GB/s:80us"
ORACLES = ("oracle(0.8)", "oracle(1)")
PEERS = ("lru", "lfu", "per-layer(lfu)")  # what the default has to beat
SHORT = {"previous-token": "previous"}

Run = dict[str, Any]
Place = tuple[str, str]  # trace and budget
Grid = dict[tuple[str, str, str, str], Run]  # by trace, budget, predictor and policy


def main() -> None:
    parser = route_grid.parser(__doc__.splitlines()[0], "policies", DEFAULT_COMPUTE)
    default = inspect.signature(Runtime).parameters["eviction"].default
    parser.add_argument("--default", default=default, help="the policy to judge")
    options = parser.parse_args()
    folder = options.dir or Path(tempfile.mkdtemp())
    traces = route_grid.find_traces(options, folder)
    grid: Grid = {}
    for path, trace in traces.items():
        grid |= simulate_all(options, path, trace)
    summary = judge(grid, options.default)
    for place in places(grid):
        report_place(grid, place)
    report_standings(summary)
    results = {
        "machine": common.machine(folder),
        "settings": {
            "traces": [route_grid.describe(trace) for trace in traces.values()],
            "nvme": NVME,
            "compute": options.compute,
        },
        "summary": summary,
        "bounds": [describe_bounds(grid, place) for place in places(grid)],
        "runs": [describe_run(run) for run in grid.values()],
    }
    common.write_results(options, results)


def simulate_all(options: Any, path: Path, trace: Trace) -> Grid:
    """Run every policy with every predictor that the trace can drive."""
    prefetch = (AUTO, *ORACLES) if trace.header.form is Form.EVENTS else (AUTO,)
    runs = route_grid.run_grid(
        options, path, eviction=policies(options.default), prefetch=prefetch, nvme=NVME
    )
    return {(run["trace"], run["hbm"], run["prefetch"], run["eviction"]): run for run in runs}


def policies(default: str) -> list[str]:
    """Return all policies that can be run; of those made from others, what people would try."""
    plain = [policy.name for policy in list_policies() if "(" not in policy.name]
    plain.remove("belady")  # stands among the bounds
    return list(dict.fromkeys([*plain, "per-layer(lru)", "per-layer(lfu)", default]))


# --- judgement ---


def judge(grid: Grid, default: str) -> dict[str, Any]:
    """Return how every policy stands, and how the default does beside its peers.

    A margin is in points of hit rate. Hits are compared without prefetch, where they are the
    policy's own doing, and again with every predictor ("anywhere"), beside the stall there.
    """
    names = list(dict.fromkeys(key[3] for key in grid))
    by_trace = {
        trace: [place for place in places(grid) if place[0] == trace]
        for trace in dict.fromkeys(trace for trace, _ in places(grid))
    }
    groups = group_by_form(grid)
    return {
        "default": default,
        "margin_over_lru": [
            {"trace": trace, "hbm": hbm, "points": margin(grid, (trace, hbm, "none"), default)}
            for trace, hbm in places(grid)
        ],
        "over_best_peer": {
            group: over_best_peer(grid, default, where)
            for group, where in (by_trace | groups).items()
        },
        "standings": {
            group: {name: standing(grid, name, where) for name in names}
            for group, where in groups.items()
        },
    }


def group_by_form(grid: Grid) -> dict[str, list[Place]]:
    """Return the places of expert routes, and apart from them those of KV and cache traces.

    Only routes have predictions: their places are those where an oracle ran.
    """
    oracle = ORACLES[0]
    predicted = {key[:2] for key in grid if key[2] == oracle}
    groups = {
        "all routes": [place for place in places(grid) if place in predicted],
        "all others": [place for place in places(grid) if place not in predicted],
    }
    return {group: where for group, where in groups.items() if where}


def standing(grid: Grid, name: str, among: Sequence[Place]) -> dict[str, Any]:
    """Return how a policy does beside lru, and with guesses beside itself without them."""
    demand = {(*place, "none"): margin(grid, (*place, "none"), name) for place in among}
    everywhere = list(dict.fromkeys(key[:3] for key in grid if key[:2] in among))
    anywhere = {where: margin(grid, where, name) for where in everywhere}
    stalls = {where: stall_ratio(grid, where, "lru", where, name) for where in everywhere}
    guesses = {
        where: stall_ratio(grid, (*where[:2], "none"), name, where, name) for where in everywhere
    }
    return {
        "mean_hit_rate": mean_hits(grid, name, among),
        "worst_margin_over_lru": worst(demand, min),
        "worst_margin_over_lru_anywhere": worst(anywhere, min),
        "mean_stall_to_lru": round(mean(stalls.values()), 4),
        "worst_stall_to_lru": worst(stalls, max),
        "worst_stall_to_no_prefetch": worst(guesses, max),
    }


def over_best_peer(grid: Grid, default: str, where: Sequence[Place]) -> dict[str, Any]:
    """Return mean hit rates without prefetch of the default and its peers, in two comparisons.

    `points` is over the peer that is best on average; `points_over_best_at_each` over an imagined
    one that is the best of them everywhere.
    """
    means = {peer: mean_hits(grid, peer, where) for peer in PEERS}
    best = max(PEERS, key=means.__getitem__)
    ideal = mean(max(grid[*place, "none", peer]["hit_rate"] for peer in PEERS) for place in where)
    own = mean_hits(grid, default, where)
    return {
        "hit_rate": own,
        "peers": means,
        "best_peer": best,
        "points": round(100 * (own - means[best]), 3),
        "points_over_best_at_each": round(100 * (own - ideal), 3),
    }


def mean_hits(grid: Grid, name: str, where: Iterable[Place]) -> float:
    return round(mean(grid[*place, "none", name]["hit_rate"] for place in where), 5)


def margin(grid: Grid, where: tuple[str, str, str], name: str) -> float:
    return round(100 * (grid[*where, name]["hit_rate"] - grid[*where, "lru"]["hit_rate"]), 3)


def stall_ratio(
    grid: Grid, base: tuple[str, str, str], peer: str, where: tuple[str, str, str], name: str
) -> float:
    """Return the stall of a policy at a place in stalls of `peer` at `base`."""
    own, other = grid[*where, name]["stall_seconds"], grid[*base, peer]["stall_seconds"]
    if not other:
        return math.inf if own else 1.0
    return round(own / other, 4)


def worst(figures: dict[tuple[str, str, str], float], choose: Callable[..., Any]) -> dict[str, Any]:
    where = choose(figures, key=figures.__getitem__)
    return dict(zip(("trace", "hbm", "prefetch"), where, strict=True)) | {"is": figures[where]}


def places(grid: Grid) -> list[Place]:
    return list(dict.fromkeys(key[:2] for key in grid))


# --- what is shown and written ---


def report_place(grid: Grid, place: Place) -> None:
    """Print hits and bytes missed without prefetch, and the stall with every predictor."""
    here = {key[2:]: run for key, run in grid.items() if key[:2] == place}
    predictors = list(dict.fromkeys(prefetch for prefetch, _ in here))
    names = dict.fromkeys(name for _, name in here)
    rows = []
    for name in sorted(names, key=lambda name: -here["none", name]["num_hits"]):
        stalls = [1e3 * here[p, name]["stall_per_token_seconds"] for p in predictors]
        run = here["none", name]
        rows.append([name, percent(run["hit_rate"]), percent(run["byte_miss_ratio"]), *stalls])
    rows += bound_rows(describe_bounds(grid, place), len(predictors))
    print(f"\n{place[0]}, {place[1]} in HBM; stall in ms/token by predictor")
    header = ["eviction", "hits %", "bytes missed %"]
    common.print_table(rows, header + [SHORT.get(name, name) for name in predictors])


def bound_rows(bounds: dict[str, Any], num_predictors: int) -> list[list[object]]:
    rest = [""] * (num_predictors - 1)
    hits = {
        form: percent(1 - bounds[f"num_misses_{form}"] / bounds["num_accesses"])
        for form in ("forced", "bypass")
    }
    missed = {form: percent(bounds[f"byte_miss_ratio_{form}"]) for form in hits}
    demand, lower = bounds["stall_demand_ms_per_token"], bounds["stall_lower_ms_per_token"]
    return [
        ["= Belady", hits["forced"], missed["forced"], demand, *rest],
        ["= Belady, bypassing", hits["bypass"], missed["bypass"], "", *rest],
        ["= least with prefetch", "", "", lower, *rest],
    ]


def report_standings(summary: dict[str, Any]) -> None:
    for group, standings in summary["standings"].items():
        print(f"\n{group}; margins are points of hit rate over lru, the worst one with its place")
        rows = []
        for name, figures in sorted(standings.items(), key=lambda row: -row[1]["mean_hit_rate"]):
            at = figures["worst_margin_over_lru"]
            rows.append(
                [
                    name,
                    percent(figures["mean_hit_rate"]),
                    signed(at["is"]),
                    f"{at['trace']} {at['hbm']}",
                    signed(figures["worst_margin_over_lru_anywhere"]["is"]),
                    figures["mean_stall_to_lru"],
                    figures["worst_stall_to_lru"]["is"],
                    figures["worst_stall_to_no_prefetch"]["is"],
                ]
            )
        columns = ["mean hits %", "margin", "at", "with prefetch", "stall to lru", "worst"]
        common.print_table(rows, ["eviction", *columns, "to no prefetch"])
    print(f"\nthe default, {summary['default']}, without prefetch; in points of hit rate")
    places = [
        [f"{row['trace']} {row['hbm']}", signed(row["points"])]
        for row in summary["margin_over_lru"]
    ]
    common.print_table(places, ["place", "over lru"])
    groups = [
        [
            group,
            percent(row["hit_rate"]),
            row["best_peer"],
            signed(row["points"]),
            signed(row["points_over_best_at_each"]),
        ]
        for group, row in summary["over_best_peer"].items()
    ]
    columns = ["mean hits %", "best peer", "over it", "over the best at each"]
    common.print_table(groups, ["traces", *columns])


def describe_run(run: Run) -> dict[str, Any]:
    same = ("trace", "hbm", "prefetch", "eviction", "num_hits", "num_misses", "num_prefetched")
    return {name: run[name] for name in same} | {
        "byte_miss_ratio": round(run["byte_miss_ratio"], 5),
        "stall_ms_per_token": round(1e3 * run["stall_per_token_seconds"], 4),
        "nvme_nbytes": run["nbytes_moved"]["nvme_to_hbm"],
        "wasted_prefetch_nbytes": run["wasted_prefetch_nbytes"],
    }


def describe_bounds(grid: Grid, place: Place) -> dict[str, Any]:
    """Return the bounds of a place, which are the same for all its runs."""
    run = next(run for key, run in grid.items() if key[:2] == place)
    bounds = dict(run["bounds"])
    for name in ("demand", "lower"):
        seconds = bounds.pop(f"stall_seconds_{name}")
        bounds[f"stall_{name}_ms_per_token"] = round(1e3 * seconds / max(run["num_tokens"], 1), 4)
    return {"trace": place[0], "hbm": place[1], "hbm_nbytes": run["hbm_nbytes"]} | bounds


def signed(points: float) -> str:
    return f"{points:+.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


if __name__ == "__main__":
    main()

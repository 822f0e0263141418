"""What guesses cost and bring: stall with prefetch beside stall without, simulated over traces.

An oracle guesses each next layer's experts with a recall from 0 (every guess is wrong) to 100 %,
over NVMe links from 1 to 100 GB/s, at 10, 25 and 50 % of the bytes of the model's experts. Two
questions: is stall with prefetch ever more than 1.02 times the stall without, and what share of
the gain of perfect guesses is left at a recall of 80 %? Every figure is a count of the simulator.

    python benchmarks/bench_guesses.py [TRACE.npz ...] [--eviction POLICY,...] [--smoke]
"""

from __future__ import annotations

import inspect
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import common
import route_grid

from tiered_mem.compare_options import split_list
from tiered_mem.runtime import Runtime

GB_PER_SECOND = (1, 3, 10, 30, 100)
LATENCY = "80us"
RECALLS = (0, 20, 40, 60, 80, 100)  # %
JUDGED = 80  # %, where the share of the perfect gain is asked for
MAX_RATIO = 1.02
MIN_SHARE = 0.5


@dataclass(frozen=True)
class Point:
    """One eviction policy, budget and link on a trace; runs by recall, None without prefetch."""

    trace: str
    eviction: str
    hbm: str
    nvme_gb_s: int
    runs: dict[int | None, dict[str, Any]]

    def stall(self, recall: int | None) -> float:
        seconds: float = self.runs[recall]["stall_seconds"]
        return seconds

    def ratio(self, recall: int) -> float:
        """Return stall with prefetch in stalls without."""
        own, without = self.stall(recall), self.stall(None)
        if not without:
            return math.inf if own else 1.0
        return own / without

    def share(self) -> float:
        """Return the gain at `JUDGED` in gains at 100 %: nan if perfect guesses gain nothing."""
        perfect = 1 - self.ratio(100)
        return (1 - self.ratio(JUDGED)) / perfect if perfect > 0 else math.nan

    def where(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "runs"}


def main() -> None:
    parser = route_grid.parser(__doc__.splitlines()[0], "guesses", "100GB/s")
    default = inspect.signature(Runtime).parameters["eviction"].default
    policies = ",".join(dict.fromkeys(["lru", default]))
    parser.add_argument("--eviction", default=policies, help="policies with commas between")
    options = parser.parse_args()
    folder = options.dir or Path(tempfile.mkdtemp())
    traces = route_grid.find_traces(options, folder)
    points = [
        point
        for path in traces
        for gb_s in GB_PER_SECOND
        for point in simulate_all(options, path, gb_s)
    ]
    points.sort(key=lambda p: (p.trace, p.eviction, route_grid.BUDGETS.index(p.hbm), p.nvme_gb_s))
    summary = summarise(points)
    report(points, summary)
    results = {
        "machine": common.machine(folder),
        "settings": {
            "traces": [route_grid.describe(trace) for trace in traces.values()],
            "nvme_latency": LATENCY,
            "compute": options.compute,
        },
        "summary": summary,
        "points": [describe(point) for point in points],
    }
    common.write_results(options, results)


def simulate_all(options: Any, path: Path, gb_s: int) -> list[Point]:
    """Run all recalls, and no prefetch, with every policy and budget on one link."""
    names = {recall: f"oracle({recall / 100:g})" for recall in RECALLS}
    runs = route_grid.run_grid(
        options,
        path,
        eviction=split_list(options.eviction),
        prefetch=["none", *names.values()],
        nvme=f"{gb_s}GB/s:{LATENCY}",
    )
    recall_of = {name: recall for recall, name in names.items()}
    points: dict[tuple[str, str], Point] = {}
    for run in runs:
        where = (run["eviction"], run["hbm"])
        point = points.setdefault(where, Point(run["trace"], *where, gb_s, {}))
        point.runs[recall_of.get(run["prefetch"])] = run
    return list(points.values())


def summarise(points: list[Point]) -> dict[str, Any]:
    """Return the worst figures and where they are, and how many miss what is asked for."""
    ratios = [(point.ratio(recall), point, recall) for point in points for recall in RECALLS]
    shares = [(share, point) for point in points if not math.isnan(share := point.share())]
    highest, at, recall = max(ratios, key=lambda row: row[0])
    lowest, poorest = min(shares, key=lambda row: row[0])
    return {
        "num_points": len(points),
        "worst_ratio": {"is": round(highest, 4), "recall": recall} | at.where(),
        "worst_ratio_by_recall": {
            str(recall): round(max(point.ratio(recall) for point in points), 4)
            for recall in RECALLS
        },
        f"num_ratios_above_{MAX_RATIO}": sum(ratio > MAX_RATIO for ratio, *_ in ratios),
        "worst_share": {"is": round(lowest, 4)} | poorest.where(),
        "mean_share": round(mean(share for share, _ in shares), 4),
        f"num_shares_below_{MIN_SHARE}": sum(share < MIN_SHARE for share, _ in shares),
        "num_without_gain": len(points) - len(shares),
    }


def report(points: list[Point], summary: dict[str, Any]) -> None:
    header = ["in HBM", "NVMe GB/s", "stall ms/token", *(f"{recall} %" for recall in RECALLS)]
    header.append(f"share at {JUDGED} %")
    for trace, eviction in dict.fromkeys((point.trace, point.eviction) for point in points):
        print(f"\n{trace}, {eviction}: stall without prefetch, and what of it is left by recall")
        rows = [
            [p.hbm, p.nvme_gb_s, 1e3 * p.runs[None]["stall_per_token_seconds"]]
            + [p.ratio(recall) for recall in RECALLS]
            + [p.share()]
            for p in points
            if (p.trace, p.eviction) == (trace, eviction)
        ]
        common.print_table(rows, header)
    print()
    for name, value in summary.items():
        print(f"{name}: {value}")


def describe(point: Point) -> dict[str, Any]:
    """Return a point and its runs; the run without prefetch says what the ratios are to."""
    same = ("num_hits", "num_hints", "num_prefetched", "num_prefetched_used")
    share = point.share()
    return point.where() | {
        "share_of_gain": None if math.isnan(share) else round(share, 4),
        "runs": [
            {
                "recall": recall,
                "ratio": 1.0 if recall is None else round(point.ratio(recall), 4),
                "stall_ms_per_token": round(1e3 * run["stall_per_token_seconds"], 4),
                "wasted_prefetch_nbytes": run["wasted_prefetch_nbytes"],
            }
            | {name: run[name] for name in same}
            for recall, run in point.runs.items()
        ],
    }


if __name__ == "__main__":
    main()

"""Miss counts of our policies beside libCacheSim's, on traces flattened to single requests.

Every block has one byte. Eight sizes for each trace, from 8 slots to four fifths of its blocks.
lru, fifo, clock, sieve, arc and belady must be equal everywhere; the others have definitional
differences that their headers and tests name. Takes minutes: each of libCacheSim's counts runs in a
process of its own, since some end badly at a few slots (null in the results).

    python benchmarks/bench_agreement.py [--smoke] [TRACE...]

TRACE is what `tiered-mem trace import` reads; a Zipf trace is always there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cache_peers
import common
import numpy as np

from tiered_mem import _core
from tiered_mem.trace_formats import import_trace

EXACT = ("lru", "fifo", "clock", "sieve", "arc", "belady")


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "agreement")
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    options = parser.parse_args()
    num_requests = 5_000 if options.smoke else 100_000
    traces = {"zipf": cache_peers.zipf(num_requests, num_requests // 10)}
    traces |= {path.name: import_trace(path).flat_keys for path in options.traces}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        found = {
            name: compare(keys, Path(folder), 2 if options.smoke else 8)
            for name, keys in traces.items()
        }
        results = {
            "machine": common.machine(folder),
            "summary": summarise(found),
            "traces": found,
        }
    report(results["summary"])
    common.write_results(options, results)


def compare(keys: cache_peers.Keys, folder: Path, num_sizes: int) -> dict[str, Any]:
    """Count both sides' misses at `num_sizes` sizes."""
    num_keys = len(np.unique(keys))
    larger = np.geomspace(64, 0.8 * num_keys, num_sizes - 1).astype(int)
    sizes = [8, *larger.tolist()]
    peer = cache_peers.libcachesim()
    path = folder / "requests.oracleGeneral"
    cache_peers.write_requests(path, keys)
    policies = {}
    for policy in cache_peers.PEERS:
        ours = [_core.count_misses(policy, keys, num_slots) for num_slots in sizes]
        theirs = cache_peers.count_apart(policy, path, sizes) if peer else [None] * len(sizes)
        policies[policy] = {"ours": ours, "libcachesim": theirs}
    counted = {"num_requests": len(keys), "num_keys": num_keys, "num_slots": sizes}
    return counted | {"misses": policies}


def summarise(traces: dict[str, Any]) -> dict[str, Any]:
    """Return by policy: whether all counts are equal, and our largest differences in points."""
    summary = {}
    for policy in cache_peers.PEERS:
        points, num_missing = [0.0], 0
        for counts in traces.values():
            both = counts["misses"][policy]
            for ours, theirs in zip(both["ours"], both["libcachesim"], strict=True):
                if theirs is None:
                    num_missing += 1
                else:
                    points.append(100 * (ours - theirs) / counts["num_requests"])
        summary[policy] = {
            "must_be_equal": policy in EXACT,
            "equal": not any(points) and num_missing == 0,
            "most_fewer_points": round(abs(min(points)), 3),
            "most_more_points": round(max(points), 3),
            "num_uncounted_by_libcachesim": num_missing,
        }
    return summary


def report(summary: dict[str, Any]) -> None:
    header = ("misses against libCacheSim", "equal", "fewer, points", "more, points", "no count")
    common.print_table(
        [
            (
                policy,
                "yes" if row["equal"] else "no",
                row["most_fewer_points"],
                row["most_more_points"],
                row["num_uncounted_by_libcachesim"],
            )
            for policy, row in summary.items()
        ],
        header,
    )


if __name__ == "__main__":
    main()

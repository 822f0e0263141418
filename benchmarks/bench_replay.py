"""Requests/s of the count-only replay beside libCacheSim's.

(a) Zipf(1.0) requests of blocks of one size over a tenth as many keys, in a cache of 8 slots for
    1000 requests: ours reads keys from an array, libCacheSim (its own C loop, hash table sized to
    fit) records from a mapped file. Both count misses. Belady: ours looks for the next uses, which
    libCacheSim finds in the file.
(b) A plug-in in Python, LRU by an ordered dict, on both sides.
(c) Bytes of memory for each slot: ours at its peak, libCacheSim's at the end, each in a process of
    its own. Without Belady, most of whose memory is the future.
(d) Nanoseconds a request on the first quarter, half and all of the longer trace.

The sides run in turns; medians of 5 rounds, of 3 on the longer trace, and (d) once. In full it
takes about 4 minutes on two idle cores, and 0.5 GB in `--dir`.

    python benchmarks/bench_replay.py [--smoke] [--rounds N]
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_peers
import common
import numpy as np

from tiered_mem import _core
from tiered_mem.policy import EvictionPolicy

POLICIES = ("lru", "sieve", "arc", "s3-fifo", "w-tinylfu", "belady")


class PythonLru(EvictionPolicy):
    """The plug-in that is timed."""

    name = "python-lru"

    def __init__(self) -> None:
        self.keys: OrderedDict[int, None] = OrderedDict()

    def insert(self, key: int, nbytes: int) -> None:
        self.keys[key] = None

    def touch(self, key: int) -> None:
        self.keys.move_to_end(key)

    def erase(self, key: int) -> None:
        del self.keys[key]

    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        for key in self.keys:
            if evictable(key):
                del self.keys[key]
                return key
        return None


@dataclass
class Requests:
    """A trace as each side reads it."""

    keys: cache_peers.Keys
    path: Path
    num_slots: int

    @classmethod
    def make(cls, num_requests: int, folder: Path) -> Requests:
        keys = cache_peers.zipf(num_requests, num_requests // 10)
        path = folder / f"zipf_{num_requests}.oracleGeneral"
        cache_peers.write_requests(path, keys)
        return cls(keys, path, num_requests * 8 // 1000)

    def ours(self, policy: str) -> float:
        """Return requests/s."""
        start = time.perf_counter()
        _core.count_misses(policy, self.keys, self.num_slots)
        return len(self.keys) / (time.perf_counter() - start)

    def theirs(self, module: Any, policy: str) -> float:
        if policy == PythonLru.name:
            cache = cache_peers.peer_plug_in(module, self.num_slots)
        else:
            cache = cache_peers.peer_cache(module, policy, self.num_slots)
        _, seconds = cache_peers.peer_misses(module, cache, self.path)
        return len(self.keys) / seconds


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "replay")
    parser.add_argument(
        "--rounds", type=int, help="default 5, or 1 with --smoke; 3 at most on 20M requests"
    )
    parser.add_argument("--memory-of", nargs=4, help="(used inside: one measurement of memory)")
    options = parser.parse_args()
    if options.memory_of:
        side, policy, path, num_slots = options.memory_of
        print(memory_of(side, policy, Path(path), int(num_slots)))
        return
    options.rounds = options.rounds or (1 if options.smoke else 5)
    few_rounds = min(options.rounds, 3)
    lengths = (10_000, 50_000) if options.smoke else (1_000_000, 20_000_000)
    _core.register_eviction(PythonLru.name, PythonLru)
    with (
        tempfile.TemporaryDirectory(dir=options.dir) as folder,
        common.OtherLoad() as other,
    ):
        rounds, memory = {}, {}
        for num_requests in lengths:
            requests = Requests.make(num_requests, Path(folder))
            rounds[str(num_requests)] = race(
                requests, POLICIES, options.rounds if num_requests == lengths[0] else few_rounds
            )
        memory = {policy: memory_by_side(policy, requests) for policy in POLICIES[:-1]}
        nanoseconds = growth(requests)
        few = Requests.make(lengths[0] // 5, Path(folder))
        plug_in = race(few, (PythonLru.name,), options.rounds)
        machine = common.machine(folder)
    results = {
        "machine": machine | {"cpus_busy_with_others": other.cpus},
        "settings": {"num_requests": lengths, "num_rounds": [options.rounds, few_rounds]},
        "summary": {
            "replay": {length: summarise(sides) for length, sides in rounds.items()},
            "plug_in": summarise(plug_in),
            "nbytes_per_slot": memory,
            "nanoseconds_per_request": nanoseconds,
        },
        "rounds": rounds | {f"plug-in, {len(few.keys)}": plug_in},
    }
    report(results["summary"])
    common.write_results(options, results)


def race(
    requests: Requests, policies: tuple[str, ...], num_rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return requests/s of every round by policy and side, measured in turns."""
    module = cache_peers.libcachesim()
    found = {}
    for policy in policies:
        sides: dict[str, Callable[[], float]] = {"ours": lambda: requests.ours(policy)}  # noqa: B023
        if module is not None:
            sides["libcachesim"] = lambda: requests.theirs(module, policy)  # noqa: B023
        found[policy] = common.interleave(sides, num_rounds)
    return found


def summarise(rounds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return millions of requests/s by policy and side, and our ratio."""
    summary = {}
    for policy, sides in rounds.items():
        rates = {side: [rate / 1e6 for rate in values] for side, values in sides.items()}
        summary[policy] = common.median_of(rates)
        if "libcachesim" in sides:
            summary[policy]["ratio"] = common.paired_ratio(sides["ours"], sides["libcachesim"])
    return summary


def growth(requests: Requests) -> dict[str, dict[str, float]]:
    """Return nanoseconds a request by policy, on parts of one trace with one size of cache."""
    parts = [len(requests.keys) // 4, len(requests.keys) // 2, len(requests.keys)]
    found: dict[str, dict[str, float]] = {}
    for policy in POLICIES:
        runs = {
            str(count): Requests(requests.keys[:count], requests.path, requests.num_slots)
            for count in parts
        }
        found[policy] = {name: round(1e9 / run.ours(policy), 1) for name, run in runs.items()}
    return found


def memory_by_side(policy: str, requests: Requests) -> dict[str, float]:
    sides = ["ours"] + ["libcachesim"] * (cache_peers.libcachesim() is not None)
    found = {}
    for side in sides:
        command = [sys.executable, __file__, "--memory-of", side, policy]
        command += [str(requests.path), str(requests.num_slots)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = round(float(done.stdout) / requests.num_slots, 1)
    return found


def memory_of(side: str, policy: str, path: Path, num_slots: int) -> int:
    """Return the bytes by which this process grew by a replay."""
    if side == "ours":
        keys = np.ascontiguousarray(np.fromfile(path, cache_peers.RECORD)["id"])
        _core.count_misses(policy, keys[:1000], 100)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory_status("VmRSS")
        _core.count_misses(policy, keys, num_slots)
        return memory_status("VmHWM") - before
    module = cache_peers.libcachesim()
    before = memory_status("RssAnon")  # the mapped trace is no memory of the cache's
    cache = cache_peers.peer_cache(module, policy, num_slots)
    cache_peers.peer_misses(module, cache, path)
    return memory_status("RssAnon") - before


def memory_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def report(summary: dict[str, Any]) -> None:
    tables = {f"M requests/s of {length}": rows for length, rows in summary["replay"].items()}
    tables["M requests/s in Python"] = summary["plug_in"]
    tables["bytes per slot"] = summary["nbytes_per_slot"]
    tables["ns per request"] = summary["nanoseconds_per_request"]
    for title, rows in tables.items():
        columns = list(next(iter(rows.values())))
        common.print_table(
            [(policy, *(row[column] for column in columns)) for policy, row in rows.items()],
            (title, *columns),
        )
        print()


if __name__ == "__main__":
    main()

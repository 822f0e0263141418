"""Served requests that share prefixes, replayed through the real cache beside the simulator.

TRACE is a JSONL of Mooncake's: each request names the blocks of its prompt, 512 tokens each. A
block's bytes are derived from its name. A request pins what HBM has of its chain, reads from NVMe
what was there once, checks every byte of both, and makes what is new. Three counts must be those of
`tiered_mem.simulate` for the same policy and budget: prefix hits (only what stands before the first
block that isn't in HBM), blocks that were there once and aren't such hits, and evictions. Of the
second, the cache reads fewer: those behind a gap may be in HBM.

- real: the first requests, with blocks of 1 MiB, which is what 512 tokens take in one layer of a
  model of 4 KV heads of 128 in 16 bits (Qwen3-30B-A3B);
- whole: all requests, with blocks of one page.

`adaptive`, the default policy, counts events: a request is one to the simulator, but up to three
here (what is there, what is read, what is made). Its figures stand beside each other; they are
close, not equal. Every other policy's must be equal.

Rates are bytes over the seconds from asking until all of a request's blocks are ready, beside the
best raw O_DIRECT rate of the same file right after. Each case runs once; all take about 5 minutes
and 15 GB in `--dir`. Without TRACE, as with
--smoke, requests of made-up conversations take its place.

    python benchmarks/bench_mooncake.py TRACE [--smoke]
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import raw_read
import torch
from random_model import default_work_dir

from tiered_mem import Runtime
from tiered_mem.kv_space import KvSpace
from tiered_mem.simulate import LinkSpeed, Machine, simulate
from tiered_mem.store import Store
from tiered_mem.trace import Trace
from tiered_mem.trace_formats import import_trace

BLOCK_TOKENS = 512
NUM_IO_THREADS = 8  # as a model's KV memory has
COUNTS_EVENTS = ("adaptive",)
MACHINE = Machine(LinkSpeed(2e9), LinkSpeed(2e10), 1e12)  # no part in what is counted


@dataclass(frozen=True)
class Case:
    """A policy, and budgets as shares of all blocks' bytes."""

    eviction: str
    hbm: float
    dram: float = 0.0


@dataclass(frozen=True)
class Scale:
    """How much of the trace, with blocks of what size. `num_requests` None: all."""

    name: str
    num_requests: int | None
    block_nbytes: int
    cases: tuple[Case, ...]


def cases(evictions: tuple[str, ...], budgets: tuple[float, ...]) -> tuple[Case, ...]:
    return tuple(Case(eviction, hbm) for hbm in budgets for eviction in evictions)


FULL = (
    Scale(
        "real",
        600,
        1 << 20,
        (*cases(("lru", "arc"), (0.05,)), Case("lru", 0.1), Case("lru", 0.05, dram=0.1)),
    ),
    Scale("whole", None, 4096, cases(("lru", "lfu", "arc", "s3-fifo", "adaptive"), (0.05,))),
)
SMOKE = (
    Scale(
        "smoke",
        None,
        1 << 16,
        (*cases(("lru", "lfu", "arc", "s3-fifo", "adaptive"), (0.1, 0.3)), Case("lru", 0.1, 0.2)),
    ),
)


class Bytes:
    """The bytes of every block, by its name."""

    def __init__(self, nbytes: int) -> None:
        self._pattern = np.random.default_rng(0).integers(0, 1 << 64, nbytes // 8, np.uint64)
        self._scratch = np.empty_like(self._pattern)

    def of(self, name: int, out: npt.NDArray[np.uint64] | None = None) -> npt.NDArray[np.uint64]:
        # An odd factor maps no two patterns to one, and differs from block to block.
        factor = (name * 0x9E3779B97F4A7C15 | 1) & (1 << 64) - 1
        return np.multiply(self._pattern, np.uint64(factor), out=out)

    def make(self, name: int) -> torch.Tensor:
        return torch.from_numpy(self.of(name).view(np.uint8))

    def same(self, name: int, found: torch.Tensor) -> bool:
        return np.array_equal(found.numpy().view(np.uint64), self.of(name, self._scratch))


@dataclass
class Counted:
    """What a replay counted; seconds of asking until all was ready, and of making new blocks."""

    num_prefix_hits: int = 0
    num_verified: int = 0
    num_wrong: int = 0
    num_made: int = 0
    read_seconds: float = 0.0
    make_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass
class Cache:
    """Blocks of prefixes on a space, by name."""

    space: KvSpace
    contents: Bytes
    counted: Counted = field(default_factory=Counted)
    indices: dict[int, int] = field(default_factory=dict)

    def serve(self, request: list[int]) -> None:
        """Get the blocks of a request that were there once, check them, and make the others."""
        known = [name for name in request if name in self.indices]
        here = {name: self.space.resident(0, self.indices[name]) for name in known}
        leading = itertools.takewhile(lambda name: here.get(name, False), request)
        self.counted.num_prefix_hits += sum(1 for _ in leading)
        parts = [[name for name in known if here[name] is present] for present in (True, False)]
        new = [name for name in request if name not in self.indices]
        blocks = [self.contents.make(name) for name in new]
        with ExitStack() as pinned:  # all of the request, until it is done
            start = time.perf_counter()
            waves = [
                (names, pinned.enter_context(self.space.begin(0, [self.indices[n] for n in names])))
                for names in parts
                if names
            ]
            ready = [(names, next(reading.waves())) for names, reading in waves]
            self.counted.read_seconds += time.perf_counter() - start
            for names, (positions, slots) in ready:
                for position, slot in zip(positions, slots, strict=True):
                    self.check(names[position], slot)
            start = time.perf_counter()
            if new:
                self.indices |= zip(new, self.space.create(0, blocks), strict=True)
            self.counted.make_seconds += time.perf_counter() - start
        self.counted.num_made += len(new)

    def check(self, name: int, slot: int) -> None:
        found = self.space.view(slot, self.space.block_nbytes(0))
        self.counted.num_verified += 1
        self.counted.num_wrong += not self.contents.same(name, found)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "mooncake")
    parser.add_argument("trace", nargs="?", type=Path, metavar="TRACE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.dir = options.dir or default_work_dir()
    options.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="mooncake-", dir=options.dir))
    try:
        source = options.trace or made_up(work / "made_up.jsonl")
        with common.OtherLoad() as other:
            runs = [
                run(scale, case, trace, work)
                for scale in (SMOKE if options.smoke else FULL)
                for trace in [load(source, scale, work)]
                for case in scale.cases
            ]
        machine = common.machine(work) | {"other_cpus": other.cpus}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    summary = {
        "num_wrong": sum(each["num_wrong"] for each in runs),
        "num_verified": sum(each["num_verified"] for each in runs),
        "all_equal": all(each["equal"] for each in runs if each["must_be_equal"]),
    }
    report(runs, summary)
    settings = {"trace": source.name, "block_tokens": BLOCK_TOKENS}
    results = {"machine": machine, "settings": settings, "summary": summary, "rounds": runs}
    common.write_results(options, results)


def made_up(path: Path, num_requests: int = 160) -> Path:
    """Write conversations of some turns each that all begin alike, in the trace's format."""
    rng = random.Random(0)
    numbers = itertools.count(4)
    chats: list[list[int]] = [[0, 1, 2, 3] for _ in range(12)]
    lines = []
    for _ in range(num_requests):
        chat = rng.choice(chats)
        chat += itertools.islice(numbers, rng.randint(0, 3))
        lengths = {"input_length": BLOCK_TOKENS * len(chat), "output_length": 1}
        lines.append(json.dumps({"timestamp": 0, **lengths, "hash_ids": chat}))
        if len(chat) > 16:
            del chat[4:]
    path.write_text("\n".join(lines) + "\n")
    return path


def load(source: Path, scale: Scale, work: Path) -> Trace:
    """Return the first requests of a trace, with the scale's blocks."""
    part = work / f"{scale.name}.jsonl"
    with source.open() as lines:
        part.write_text("".join(itertools.islice(lines, scale.num_requests)))
    return import_trace(part, token_nbytes=scale.block_nbytes // BLOCK_TOKENS)


def run(scale: Scale, case: Case, trace: Trace, work: Path) -> dict[str, Any]:
    """Replay the trace through a new cache and through the simulator."""
    hbm, dram = (int(share * trace.total_nbytes) for share in (case.hbm, case.dram))
    longest = int(np.diff(trace.offsets).max())
    if hbm < longest * scale.block_nbytes:
        raise SystemExit(f"hbm={case.hbm:.0%} can't hold the longest request, {longest} blocks")
    simulated = simulate(trace, hbm=hbm, eviction=case.eviction, machine=MACHINE)
    directory = Path(tempfile.mkdtemp(dir=work))
    try:
        with (
            Store.open(directory, mode="w", durable=False) as store,
            Runtime(hbm, dram, eviction=case.eviction, num_io_threads=NUM_IO_THREADS) as runtime,
        ):
            space = runtime.attach_kv(store)
            space.add_layer(0, scale.block_nbytes)
            cache = Cache(space, Bytes(scale.block_nbytes))
            start = time.perf_counter()
            for i in range(trace.num_events):
                cache.serve((trace.event(i) & np.uint64(0xFFFFFFFF)).tolist())
            cache.counted.total_seconds = time.perf_counter() - start
            stats = runtime.stats()
            (data,) = directory.rglob("data.mdb")
            raw = raw_read.best_rate(data)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    counted = cache.counted
    found = {
        "num_prefix_hits": counted.num_prefix_hits,
        "num_known_no_hits": counted.num_verified - counted.num_prefix_hits,
        "num_evictions": stats.num_evictions,
    }
    same = {
        "num_prefix_hits": simulated.num_hits,
        "num_known_no_hits": simulated.nbytes_moved["nvme_to_hbm"] // scale.block_nbytes,
        "num_evictions": simulated.num_evictions,
    }
    nbytes_back = counted.num_verified * scale.block_nbytes
    line = {
        "scale": scale.name,
        "num_requests": trace.num_events,
        "num_accesses": trace.num_accesses,
        "num_blocks": len(trace.blocks[0]),
        "block_nbytes": scale.block_nbytes,
        **asdict(case),
        "hbm_nbytes": hbm,
        "dram_nbytes": dram,
        **found,
        "simulated": same,
        "hit_rate": counted.num_prefix_hits / trace.num_accesses,
        "simulated_hit_rate": simulated.hit_rate,
        "equal": found == same,
        "must_be_equal": case.eviction not in COUNTS_EVENTS,
        **asdict(counted),
        "num_nvme_reads": stats.num_nvme_reads,
        "num_dram_hits": stats.num_dram_hits,
        "returned_bytes_per_second": nbytes_back / counted.read_seconds,
        "nvme_bytes_per_second": stats.nbytes_moved["nvme_to_hbm"] / counted.read_seconds,
        "made_bytes_per_second": counted.num_made * scale.block_nbytes / counted.make_seconds,
        "raw_bytes_per_second": raw,
    }
    print_progress(line)
    return line


def print_progress(line: dict[str, Any]) -> None:
    print(
        f"{line['scale']}: {line['eviction']} {line['hbm']:.0%}, "
        f"{line['total_seconds']:.1f} s, {'equal' if line['equal'] else 'not equal'}",
        flush=True,
    )


def report(runs: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    rows = [
        [
            f"{line['scale']} {line['eviction']}",
            f"{line['hbm']:.0%} + {line['dram']:.0%}",
            100 * line["hit_rate"],
            100 * line["simulated_hit_rate"],
            line["equal"],
            line["num_verified"],
            line["num_wrong"],
            line["returned_bytes_per_second"] / 1e6,
            line["nvme_bytes_per_second"] / 1e6,
            line["raw_bytes_per_second"] / 1e6,
            line["made_bytes_per_second"] / 1e6,
        ]
        for line in runs
    ]
    names = "run|hbm + dram|hit %|simulated|equal|verified|wrong|back MB/s|nvme|raw|made"
    common.print_table(rows, names.split("|"))
    common.print_table([[key, value] for key, value in summary.items()], ["", "value"])


if __name__ == "__main__":
    main()

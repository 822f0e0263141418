"""How well the simulator foretells a run: the stall of a decoding model, and every decision.

A wrapped model (random weights, experts of 1.8 MB) reads random tokens one by one from a cold
start, over an NVMe link that is slowed down to a known rate. Its trace, recorded on the way, is
replayed on a virtual link of that rate, and of the latency that lone reads on the same machine show
just before (a median of 40), with the same policy and budgets. Compared are the stall of both, and
their hits, misses and evictions.

    python benchmarks/bench_fidelity.py [--smoke]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from random_model import SHAPES, default_work_dir, random_model, random_tokens
from transformers.utils import logging

import tiered_mem
from tiered_mem.simulate import LinkSpeed, Machine, simulate
from tiered_mem.stats import Log

POLICIES = ("lru", "adaptive")
BUDGET = "25%"
RATES = (300e6, 600e6)  # bytes/s: below what the disk can do, so that the rate is what it says
NUM_PROBES = 40


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "fidelity")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    parser.add_argument("--tokens", type=int, help="default 12, also with --smoke")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    num_rounds = options.rounds or (1 if options.smoke else 5)
    num_tokens = options.tokens or 12
    rates = RATES[:1] if options.smoke else RATES
    cases = [(policy, rate) for policy in POLICIES for rate in rates]
    shape = SHAPES["smoke" if options.smoke else "full"]
    work_dir = options.dir or default_work_dir()
    model = random_model(shape, work_dir)
    store = work_dir / f"{shape.name}-files" / "fidelity"
    store.mkdir(parents=True, exist_ok=True)
    ids = torch.tensor([random_tokens(shape, num_tokens, seed=0)])
    with common.OtherLoad() as load:
        rounds = [
            {"round": number, **measure(model, store, policy, rate, ids)}
            for number in range(num_rounds)
            for policy, rate in cases
        ]
        machine = common.machine(work_dir)
    summary = [summarise(policy, rate, rounds) for policy, rate in cases]
    common.print_table(
        [list(line.values()) for line in summary], [name.replace("_", " ") for name in summary[0]]
    )
    common.write_results(
        options,
        {
            "machine": machine | {"other_cpus": load.cpus},
            "settings": {"model": vars(shape), "num_tokens": num_tokens, "hbm": BUDGET},
            "summary": summary,
            "rounds": rounds,
        },
    )


def measure(path: Path, store: Path, policy: str, rate: float, ids: torch.Tensor) -> dict[str, Any]:
    """Run and replay once; seconds, bytes/s, counts."""
    latency = probe(path, store, rate)
    model = tiered_mem.from_pretrained(
        path, hbm=BUDGET, dram=0, nvme=store, eviction=policy, prefetch="none"
    )
    handle = model.tiered_mem
    try:
        handle.runtime.throttle("nvme_to_hbm", rate)
        handle.runtime.keep_log(True)
        with handle.record(predictions=False) as recorder:
            read(model, ids)
        happened, stats, hbm = handle.runtime.take_log(), handle.stats(), handle.budgets.hbm
    finally:
        handle.close()
    logs: list[Log] = []
    link = LinkSpeed(rate, latency)
    replay = simulate(
        recorder.trace(),
        hbm=hbm,
        eviction=policy,
        machine=Machine(nvme=link, hbm=link, compute=1e12),
        on_log=logs.append,
    )
    same = all(np.array_equal(a, b) for a, b in zip(happened, logs[0], strict=True))
    return {
        "eviction": policy,
        "bytes_per_second": rate,
        "latency_seconds": latency,
        "stall_seconds": stats.stall_seconds,
        "simulated_stall_seconds": replay.stall_seconds,
        "num_misses": stats.num_nvme_reads,
        "same_decisions": same,
    }


def probe(path: Path, store: Path, rate: float) -> float:
    """Return what a lone read takes beyond its bytes' time at this rate, a median in seconds."""
    model = tiered_mem.from_pretrained(path, hbm="100%", dram=0, nvme=store, prefetch="none")
    handle = model.tiered_mem
    try:
        handle.runtime.throttle("nvme_to_hbm", rate)
        extra = []
        experts = [range(layout.num_experts) for layout in handle.layouts]
        every = [(layer, index) for layer, indices in enumerate(experts) for index in indices]
        for layer, index in every[:NUM_PROBES]:
            before = handle.stats()
            with handle.experts[layer].space.begin(layer, [index]) as reading:
                for _ in reading:
                    pass
            took = (handle.stats() - before).stall_seconds
            extra.append(took - handle.layouts[layer].nbytes / rate)
    finally:
        handle.close()
    return max(statistics.median(extra), 0.0)


def read(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        cache = None
        for position in range(ids.shape[1]):
            token = ids[:, position : position + 1]
            cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values


def summarise(policy: str, rate: float, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [r for r in rounds if (r["eviction"], r["bytes_per_second"]) == (policy, rate)]
    errors = [r["simulated_stall_seconds"] / r["stall_seconds"] - 1 for r in mine]
    return {
        "eviction": policy,
        "mb_per_second": rate / 1e6,
        "stall_seconds": statistics.median(r["stall_seconds"] for r in mine),
        "simulated_stall_seconds": statistics.median(r["simulated_stall_seconds"] for r in mine),
        "median_error_percent": 100 * statistics.median(errors),
        "worst_error_percent": 100 * max(errors, key=abs),
        "same_decisions": all(r["same_decisions"] for r in mine),
    }


if __name__ == "__main__":
    main()

"""What the runtime costs when there is nothing to wait for.

(a) `acquire` of an event of 8 resident experts, and its release, in microseconds.
(b) Tokens/s of a model with every expert resident beside the unmodified model, token by token in
    turns in one process. The same matmul is `F.linear` on each expert ("linear" below, without
    any bookkeeping); transformers' default on CPUs (`grouped_mm`) and its loop (`eager`) follow.

    python benchmarks/bench_overhead.py [--smoke]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import transformers
from decode_peers import RESIDENT, folder_of, load
from random_model import SHAPES, default_work_dir, random_model, random_tokens
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface

from tiered_mem import _core
from tiered_mem.keys import BlockKey
from tiered_mem.store import Store

EVENT_SIZE = 8


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "overhead")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.rounds = options.rounds or (1 if options.smoke else 5)
    options.dir = options.dir or default_work_dir()
    shape = SHAPES["smoke" if options.smoke else "full"]
    checkpoint = random_model(shape, options.dir)
    ours = load(RESIDENT, shape, options.dir)
    stock = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ways = {"tiered_mem": Way(ours.forward)}
    ways |= {name: Way(stock, name) for name in ("linear", "grouped_mm", "eager")}
    tokens = random_tokens(shape, 6 if options.smoke else 40, seed=0)
    decode = decode_rounds(ways, tokens, options.rounds)
    ours.handle.close()
    store = folder_of(RESIDENT, shape, options.dir)
    num_events = 200 if options.smoke else 20_000
    events = [event_microseconds(store, num_events) for _ in range(options.rounds)]
    results = {
        "machine": common.machine(options.dir),
        "settings": {"shape": vars(shape), "num_tokens": len(tokens), "num_events": num_events},
        "summary": summarise(events, decode),
        "rounds": {"event_us": events, "decode": decode},
    }
    report(results["summary"])
    common.write_results(options, results)


def event_microseconds(store_path: Path, num_events: int) -> dict[str, float]:
    """Return the median microseconds of each step of an event whose blocks are all resident."""
    with Store.open(store_path) as store, store.snapshot() as snapshot:
        keys = snapshot.keys()
        extents = snapshot.extents([BlockKey.unpack(int(key)) for key in keys])
        tiers = _core.Tiers(hbm=sum(-(-e.nbytes // 4096) * 4096 for e in extents), dram=0)
        try:
            tiers.add_blocks(keys, extents)
            for few in np.array_split(keys, max(1, len(keys) // EVENT_SIZE)):
                _run_event(tiers, few)
            # Different keys each time, as from layer to layer, so that no cache line is just used.
            random = np.random.default_rng(0)
            size = min(EVENT_SIZE, len(keys))
            events = [random.choice(keys, size, replace=False) for _ in range(256)]
            times = [_run_event(tiers, events[n % len(events)]) for n in range(num_events)]
        finally:
            tiers.close()
    medians = np.median(np.array(times), axis=0) / 1e3
    return dict(zip(("acquire", "wait_any", "release", "whole"), medians.tolist(), strict=True))


def _run_event(tiers: Any, keys: np.ndarray) -> tuple[int, int, int, int]:
    """Acquire, wait for every block, release. Return the nanoseconds of each and of all."""
    start = time.perf_counter_ns()
    event = tiers.acquire(keys)
    acquired = time.perf_counter_ns()
    done = 0
    while done < len(keys):
        ready, failed = event.wait_any()
        if failed:
            raise OSError(f"blocks could not be read: {failed}")
        done += len(ready)
    waited = time.perf_counter_ns()
    event.release()
    released = time.perf_counter_ns()
    return acquired - start, waited - acquired, released - waited, released - start


def linear_experts(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute the experts of one token the shortest way there is in Python: `F.linear` on each.

    Leaner than transformers' own loop, so the unmodified model has no bookkeeping to hide behind.
    """
    outputs = []
    for expert in top_k_index[0].tolist():
        inner = self._apply_gate(F.linear(hidden_states, self.gate_up_proj[expert]))
        outputs.append(F.linear(inner, self.down_proj[expert]))
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1, 1)
    return weighted.sum(dim=0, keepdim=True).to(hidden_states.dtype)


ExpertsInterface.register("linear", linear_experts)


@dataclass(frozen=True)
class Way:
    """A model and the experts function it is to compute with (None: leave what it has)."""

    model: Any
    experts: str | None = None

    def decode(self, tokens: list[int]) -> Iterator[tuple[float, torch.Tensor]]:
        """Feed tokens one by one; yield each one's seconds and the logits after it."""
        cache = transformers.DynamicCache(config=self.model.config)
        for token in tokens:
            ids = torch.tensor([[token]])
            if self.experts is not None:
                self.model.set_experts_implementation(self.experts)
            start = time.perf_counter()
            with torch.inference_mode():
                logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            yield time.perf_counter() - start, logits[0, -1].float()


def decode_rounds(
    ways: dict[str, Way], tokens: list[int], num_rounds: int
) -> dict[str, list[list[float]]]:
    """Return seconds by way, round and token. The ways take turns at every token."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        steppers = {name: way.decode(tokens) for name, way in ways.items()}
        for rows in seconds.values():
            rows.append([])
        for number in range(len(tokens)):
            turn = number % len(ways)
            names = list(ways)
            for name in names[turn:] + names[:turn]:
                took, _ = next(steppers[name])
                seconds[name][-1].append(took)
    return seconds


def summarise(
    events: list[dict[str, float]], decode: dict[str, list[list[float]]]
) -> dict[str, Any]:
    """Return medians over rounds; a round's tokens/s is that of its median token."""
    speed = {name: [1 / statistics.median(row) for row in rows] for name, rows in decode.items()}
    return {
        "event_us": {key: statistics.median(row[key] for row in events) for key in events[0]},
        "tokens_per_second": common.median_of(speed),
        "tiered_mem_to": {
            name: common.paired_ratio(speed["tiered_mem"], rows) for name, rows in speed.items()
        },
    }


def report(summary: dict[str, Any]) -> None:
    common.print_table(
        [list(summary["event_us"].values())], [f"{key} us" for key in summary["event_us"]]
    )
    ratios = summary["tiered_mem_to"]
    rows = [[name, speed, ratios[name]] for name, speed in summary["tokens_per_second"].items()]
    common.print_table(rows, ["experts by", "tok/s", "tiered_mem to it"])


if __name__ == "__main__":
    main()

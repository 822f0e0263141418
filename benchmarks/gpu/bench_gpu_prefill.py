"""Prefill a long prompt with a quarter of the experts in HBM, the rest in DRAM.

All tokens of the prompt go through a layer at once and use nearly all of its experts, so the link
is the limit: the bound is max(compute, missed bytes / link), computing being the unmodified model's
prefill with all weights on the card, and the link's rate measured in this run. Routes are those of
a recorded trace, its tokens again and again.

    python benchmarks/gpu/bench_gpu_prefill.py --trace ROUTES.csv [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import gpu_common
import numpy as np
from bars import bar, common, print_bars
from big_model import BigModel, add_arguments, big_model
from feeding import Feeder
from forced_routes import load_trace, routes_of
from gpu_common import Links, bound_seconds, seconds_of
from gpu_peers import UNMODIFIED, measured, ours, resident_model

HBM_SHARE = 25  # % of the experts


def main() -> None:
    options = _options()
    big = big_model(options)
    ids = routes_of(load_trace(options.trace, smoke=options.smoke), big.shape)
    repeats = -(-options.num_tokens // len(ids))
    feeder = Feeder(
        np.tile(ids, (repeats, 1, 1))[: options.num_tokens], big.shape.vocab, options.device
    )
    links = Links(options.device, big.block_nbytes, big.store_file, smoke=options.smoke)
    whole, device = big.shape.experts_nbytes, options.device
    runs = {
        UNMODIFIED: measured(
            device, lambda: resident_model(big, device), partial(_prefills, options, feeder)
        ),
        "ours": measured(
            device,
            lambda: ours(big, device, hbm=whole * HBM_SHARE // 100, dram=whole),
            partial(_ours, options, feeder, links),
        ),
    }
    difference = runs["ours"].pop("logits") - runs[UNMODIFIED].pop("logits")
    compute = statistics.median(runs[UNMODIFIED]["seconds"])
    summary = _summary(runs["ours"], compute, big, links)
    summary["max_abs_dlogit"] = float(difference.abs().max())
    what = f"prefill of {options.num_tokens} tokens, HBM {HBM_SHARE} %, of the bound"
    results = gpu_common.describe(options) | {
        "model": big.as_dict(),
        "settings": {"num_tokens": options.num_tokens, "hbm_share": HBM_SHARE / 100},
        "links": links.as_dict(),
        "bars": [bar(what, summary["of_bound"], 0.85)],
        "summary": summary,
        "runs": runs,
    }
    gpu_common.write(options, results)
    common.print_table([list(summary.values())], list(summary))
    print_bars(results)


def _options() -> argparse.Namespace:
    parser = gpu_common.parser(__doc__.splitlines()[0], "prefill")
    parser.add_argument("--trace", type=Path, help="expert routes: a CSV or npz of 128 experts")
    add_arguments(parser)
    parser.add_argument("--num-tokens", type=int, help="of the prompt: 4096, or 64 with --smoke")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over so many")
    options = gpu_common.parse(parser)
    options.num_tokens = options.num_tokens or (64 if options.smoke else 4096)
    return options


def _ours(options: argparse.Namespace, feeder: Feeder, links: Links, model: Any) -> dict[str, Any]:
    model.tiered_mem.fill()
    links.measure()
    run = _prefills(options, feeder, model)
    links.measure()
    return run


def _prefills(options: argparse.Namespace, feeder: Feeder, model: Any) -> dict[str, Any]:
    """Prefill again and again; the first, unmeasured, brings the tiers into their usual state."""
    handle = getattr(model, "tiered_mem", None)
    hooks = feeder.routes.force(model)
    run: dict[str, Any] = {"seconds": [], "stats": []}

    def prefill() -> None:
        run["logits"] = feeder.step(model, options.num_tokens)

    for number in range(options.rounds + 1):
        before = handle.stats() if handle else None
        feeder.start(model)
        took = seconds_of(options.device, prefill)
        if number:
            run["seconds"].append(took)
            if handle is not None:
                run["stats"].append((handle.stats() - before).as_dict())
    run["logits"] = run["logits"].float().cpu()
    for hook in hooks:
        hook.remove()
    return run


def _summary(run: dict[str, Any], compute: float, big: BigModel, links: Links) -> dict[str, Any]:
    bounds = [bound_seconds(stats, big.block_nbytes, compute, links) for stats in run["stats"]]
    shares = [least / took for (least, _), took in zip(bounds, run["seconds"], strict=True)]
    return {
        "seconds": statistics.median(run["seconds"]),
        "bound_seconds": statistics.median(least for least, _ in bounds),
        "compute_seconds": compute,
        "of_bound": statistics.median(shares),
        "missed_gb": statistics.median(sum(moved.values()) / 1e9 for _, moved in bounds),
    }


if __name__ == "__main__":
    main()

"""Peak device memory: the budget, the weights that aren't experts, the activations, and 2 %.

Both models prefill the same prompt on their own routes and decode a little. The activations are
what the unmodified model's peak is above its weights. What ours takes is read in two ways: torch's
own account, which the bar is about, and what all of the card's memory has less than before.

    python benchmarks/gpu/bench_gpu_memory.py [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
from typing import Any

import gpu_common
from bars import bar, common, print_bars
from big_model import BigModel, add_arguments, big_model
from gpu_common import DeviceMemory
from gpu_peers import UNMODIFIED, ours, release, resident_model
from small_text import generate, prompt_of

HBM_SHARE = 25  # % of the experts
SLACK = 0.02


def main() -> None:
    options = _options()
    big = big_model(options)
    unmodified = _unmodified(options, big)
    mine = _ours(options, big)
    activations = unmodified["peaks"]["allocated"] - unmodified["loaded_nbytes"]
    parts = {
        "budget": mine["budget_nbytes"],
        "non_expert_weights": big.non_expert_nbytes,
        "activations": activations,
    }
    used = mine["peaks"]["allocated"] - mine["held_before_nbytes"]
    ratio = used / sum(parts.values())
    what = f"peak device memory, prefill of {options.num_tokens} tokens, of what it may be"
    results = gpu_common.describe(options) | {
        "model": big.as_dict(),
        "settings": {"num_tokens": options.num_tokens, "hbm_share": HBM_SHARE / 100},
        "bars": [bar(what, ratio, 1 + SLACK, at_most=True)],
        "summary": {
            "parts_nbytes": parts,
            "peak_nbytes": used,
            "peak_to_parts": ratio,
            "taken_nbytes": mine["peaks"]["taken"],
            "unmodified_taken_nbytes": unmodified["peaks"]["taken"],
        },
        "runs": {UNMODIFIED: unmodified, "ours": mine},
    }
    gpu_common.write(options, results)
    rows = [[name, nbytes / 1e6] for name, nbytes in (parts | {"peak": used}).items()]
    rows.append(["taken from the card", mine["peaks"]["taken"] / 1e6])
    common.print_table(rows, ["device memory", "MB"])
    print_bars(results)


def _options() -> argparse.Namespace:
    parser = gpu_common.parser(__doc__.splitlines()[0], "memory")
    add_arguments(parser)
    parser.add_argument("--num-tokens", type=int, help="of the prompt: 4096, or 32 with --smoke")
    options = gpu_common.parse(parser)
    options.num_tokens = options.num_tokens or (32 if options.smoke else 4096)
    return options


def _unmodified(options: argparse.Namespace, big: BigModel) -> dict[str, Any]:
    memory = DeviceMemory(options.device)
    model = resident_model(big, options.device)
    loaded = memory.held()
    memory.reset_peak()
    run = _run(options, big, model, memory)
    del model
    release(options.device)
    return run | {"loaded_nbytes": loaded}


def _ours(options: argparse.Namespace, big: BigModel) -> dict[str, Any]:
    whole = big.shape.experts_nbytes
    memory = DeviceMemory(options.device)
    model = ours(big, options.device, hbm=whole * HBM_SHARE // 100, dram=whole)
    try:
        run = _run(options, big, model, memory)  # the peak is counted from before the loading
        return run | {"budget_nbytes": model.tiered_mem.budgets.hbm}
    finally:
        model.tiered_mem.close()
        del model
        release(options.device)


def _run(
    options: argparse.Namespace, big: BigModel, model: Any, memory: DeviceMemory
) -> dict[str, Any]:
    prompt = prompt_of(big, options.num_tokens, options.device)
    generate(model, prompt, num_tokens=4)
    return {"peaks": memory.peaks(), "held_before_nbytes": memory.held_before}


if __name__ == "__main__":
    main()

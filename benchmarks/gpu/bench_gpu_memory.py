"""Peak device memory: the budget, the weights that aren't experts, the activations, and 2 %.

Both models prefill the same prompt on their own routes and decode a little. The activations are
what the unmodified model's peak is above its weights. What ours takes is read in two ways: torch's
own account, which the bar is about, and what all of the card's memory has less than before.

    python benchmarks/gpu/bench_gpu_memory.py [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import gpu_common
import torch
from bars import bar, common, print_bars
from big_model import add_arguments, big_model
from gpu_common import DeviceMemory
from gpu_peers import UNMODIFIED, measured, ours, resident_model
from small_text import generate, prompt_of

HBM_SHARE = 25  # % of the experts
SLACK = 0.02


def main() -> None:
    options = _options()
    big = big_model(options)
    prompt = prompt_of(big, options.num_tokens, options.device)
    whole, device = big.shape.experts_nbytes, options.device
    hbm = whole * HBM_SHARE // 100
    unmodified = _run(options, prompt, lambda: resident_model(big, device))
    mine = _run(options, prompt, lambda: ours(big, device, hbm=hbm, dram=whole))
    parts = {
        "budget": mine["budget_nbytes"],
        "non_expert_weights": big.non_expert_nbytes,
        "activations": _peak(unmodified, "working") - unmodified["loaded_nbytes"],
    }
    used = max(_peak(mine, when) for when in ("loading", "working")) - mine["before_nbytes"]
    taken = mine["peaks"]["working"]["taken"]
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
            "taken_nbytes": taken,
        },
        "runs": {UNMODIFIED: unmodified, "ours": mine},
    }
    gpu_common.write(options, results)
    rows = [[name, nbytes / 1e6] for name, nbytes in (parts | {"peak": used}).items()]
    rows.append(["taken from the card", taken / 1e6])
    common.print_table(rows, ["device memory", "MB"])
    print_bars(results)


def _options() -> argparse.Namespace:
    parser = gpu_common.parser(__doc__.splitlines()[0], "memory")
    add_arguments(parser)
    parser.add_argument("--num-tokens", type=int, help="of the prompt: 4096, or 32 with --smoke")
    options = gpu_common.parse(parser)
    options.num_tokens = options.num_tokens or (32 if options.smoke else 4096)
    return options


def _run(
    options: argparse.Namespace, prompt: torch.Tensor, make: Callable[[], Any]
) -> dict[str, Any]:
    """Return the peaks of a model: of its loading, and of its work."""
    memory = DeviceMemory(options.device)

    def work(model: Any) -> dict[str, Any]:
        loading = memory.peaks()
        memory.reset_peak()
        loaded = memory.held()
        generate(model, prompt, num_tokens=4)
        handle = getattr(model, "tiered_mem", None)
        return {
            "before_nbytes": memory.held_before,
            "loaded_nbytes": loaded,
            "budget_nbytes": handle.budgets.hbm if handle else 0,
            "peaks": {"loading": loading, "working": memory.peaks()},
        }

    return measured(options.device, make, work)


def _peak(run: dict[str, Any], when: str) -> int:
    peak: int = run["peaks"][when]["allocated"]
    return peak


if __name__ == "__main__":
    main()

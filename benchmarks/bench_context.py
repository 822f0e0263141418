"""Decoding after a long context whose keys and values don't fit their budget.

A random Llama in float32 and a context of random keys and values, put into each cache as it is
(computing a prompt of that length says nothing of the cache). Tokens are then decoded beside

- memory: transformers' own cache, all of it in memory;
- whole: the tiered cache with a budget for everything;
- small: the tiered cache with a budget of 5 %, the rest on disk, its file dropped from the page
  cache before each round.

The limit of the last one is max(seconds of `whole`, bytes read / the raw O_DIRECT rate measured on
the same file in the same round). The tokens of all three must be equal.

    python benchmarks/bench_context.py [--smoke]
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cold
import common
import raw_read
import torch
from random_model import default_work_dir
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tiered_mem

SHARE = 0.05
CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class Shape:
    num_tokens: int
    num_layers: int
    num_new: int
    hidden: int = 256
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64

    @property
    def kv_nbytes(self) -> int:
        return self.num_tokens * self.num_layers * self.num_kv_heads * self.head_dim * 2 * 4


SHAPES = {"full": Shape(131_072, 4, 8), "smoke": Shape(2048, 2, 3)}


@dataclass
class Peer:
    """A model with a cache that holds the context."""

    model: Any
    cache: Any
    directory: Path | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def decode(self, first: int, num_new: int) -> None:
        """Decode greedily, note how it went, and take the new tokens back out of the cache."""
        token, tokens, seconds, logits = first, [], [], None
        raw = None
        if self.directory is not None:
            (data,) = self.directory.rglob("data.mdb")
            raw = raw_read.best_rate(data)
            cold.drop([data])
        handle = getattr(self.model, "tiered_mem", None)
        before = None if handle is None else handle.stats()
        for _ in range(num_new):
            start = time.perf_counter()
            with torch.inference_mode():
                logits = self.model(
                    input_ids=torch.tensor([[token]]), past_key_values=self.cache
                ).logits[0, -1]
            token = int(logits.argmax())
            seconds.append(time.perf_counter() - start)
            tokens.append(token)
        found: dict[str, Any] = {"seconds": seconds, "tokens": tokens, "raw_rate": raw}
        if before is not None:
            done = handle.stats() - before
            found["nbytes_read"] = done.nbytes_moved["nvme_to_hbm"] / num_new
            found["stall_seconds"] = done.stall_seconds / num_new
            found["hbm_nbytes"] = handle.runtime.nbytes_used()["hbm"]
        self.cache.crop(-num_new)
        self.rounds.append(found)
        self.logits = logits


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "context")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.rounds = options.rounds or (1 if options.smoke else 5)
    shape = SHAPES["smoke" if options.smoke else "full"]
    options.dir = options.dir or default_work_dir()
    options.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="context-", dir=options.dir))
    try:
        peers = make_peers(shape, work)
        with common.OtherLoad() as other:
            for number in range(options.rounds):
                names = list(peers)
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    peers[name].decode(first=7, num_new=shape.num_new)
        results = {
            "machine": common.machine(options.dir) | {"other_cpus": other.cpus},
            "settings": vars(shape) | {"kv_nbytes": shape.kv_nbytes, "share": SHARE},
            "summary": summarise(peers, shape),
            "rounds": {name: peer.rounds for name, peer in peers.items()},
        }
        for name in ("whole", "small"):
            peers[name].model.tiered_mem.close()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(results["summary"])
    common.write_results(options, results)


def make_peers(shape: Shape, work: Path) -> dict[str, Peer]:
    peers = {"memory": Peer(make_model(shape), None)}
    peers["memory"].cache = DynamicCache(config=peers["memory"].model.config)
    for name, share in (("whole", 1.1), ("small", SHARE)):
        model = make_model(shape)
        tiered_mem.tier_kv(model, int(share * shape.kv_nbytes), nvme=work / name)
        small = name == "small"
        peers[name] = Peer(model, model.tiered_mem.cache(), work / name if small else None)
    fill([peer.cache for peer in peers.values()], shape)
    return peers


def make_model(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * shape.num_tokens,
        initializer_range=0.1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def fill(caches: list[Any], shape: Shape) -> None:
    """Put the same random keys and values into every cache."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(0, shape.num_tokens, CHUNK_TOKENS):
        size = (1, shape.num_kv_heads, min(CHUNK_TOKENS, shape.num_tokens), shape.head_dim)
        for layer in range(shape.num_layers):
            keys, values = (torch.randn(size, generator=generator) for _ in range(2))
            for cache in caches:
                cache.update(keys, values, layer)
                if hasattr(cache.layers[layer], "seal"):
                    cache.layers[layer].seal()


def summarise(peers: dict[str, Peer], shape: Shape) -> dict[str, Any]:
    seconds = {
        name: [statistics.median(r["seconds"]) for r in peer.rounds] for name, peer in peers.items()
    }
    small = peers["small"].rounds
    limits = [
        max(whole, r["nbytes_read"] / r["raw_rate"])
        for whole, r in zip(seconds["whole"], small, strict=True)
    ]
    tokens = {name: [r["tokens"] for r in peer.rounds] for name, peer in peers.items()}
    reference = peers["memory"].logits
    return {
        "seconds_per_token": common.median_of(seconds),
        "to_memory": {
            name: common.paired_ratio(seconds[name], seconds["memory"]) for name in seconds
        },
        "small_to_limit": common.paired_ratio(seconds["small"], limits),
        "small_mb_read_per_token": statistics.median(r["nbytes_read"] for r in small) / 1e6,
        "small_stall_seconds_per_token": statistics.median(r["stall_seconds"] for r in small),
        "small_hbm_nbytes": max(r["hbm_nbytes"] for r in small),
        "small_budget_nbytes": int(SHARE * shape.kv_nbytes),
        "same_tokens": tokens["memory"] == tokens["whole"] == tokens["small"],
        "largest_logit_difference": max(
            float((peer.logits - reference).abs().max()) for peer in peers.values()
        ),
    }


def report(summary: dict[str, Any]) -> None:
    rows = [
        [name, seconds, summary["to_memory"][name]]
        for name, seconds in summary["seconds_per_token"].items()
    ]
    common.print_table(rows, ["cache", "s/token", "to memory"])
    rows = [[key, value] for key, value in summary.items() if not isinstance(value, dict)]
    common.print_table(rows, ["", "value"])


if __name__ == "__main__":
    main()

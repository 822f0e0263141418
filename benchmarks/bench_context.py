"""Decoding after a long context whose keys and values don't fit their budget.

A random Llama in float32 and a context of random keys and values, put into each cache as it is
(computing a prompt of that length says nothing of the cache). Tokens are then decoded beside

- dynamic: transformers' own cache, all of it in memory, which copies all of it for each token;
- preallocated: all of it in memory that is made once and appended to, with transformers' own
  attention: the fastest that stock attention can be, and what tiered caches are compared with;
- whole: the tiered cache with a budget for everything;
- 50%, 25%, 5%: the tiered cache with that budget, the rest on disk, its file dropped from the page
  cache before each turn.

The limit of the last ones is max(seconds of `preallocated`, bytes read / raw rate), the raw rate
that of O_DIRECT reads of the same file: the mean of before and after the turn, and, for the strict
limit, the best that was seen in the whole run. Tokens must be equal, and the logits of every token
are compared with those of `dynamic`. The peak of the arena is sampled while tokens are decoded
that don't count.

    python benchmarks/bench_context.py [--smoke]
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
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
from transformers.cache_utils import DynamicLayer

import tiered_mem

SHARES = {"whole": 1.1, "50%": 0.5, "25%": 0.25, "5%": 0.05}
COLD = ("50%", "25%", "5%")
CHUNK_TOKENS = 4096
FIRST_TOKEN = 7
SAMPLE_SECONDS = 1e-3


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


SHAPES = {"full": Shape(131_072, 4, 8), "smoke": Shape(4096, 2, 3)}


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in memory that is made once: appending copies nothing but what is new."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.room, self.used = num_tokens, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.memory = [
                states.new_empty(*states.shape[:2], self.room, states.shape[3])
                for states in (key_states, value_states)
            ]
        end = self.used + key_states.shape[2]
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, self.used : end] = states
        self._show(end)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        self._show(self.used + tokens_to_remove)

    def get_seq_length(self) -> int:
        return self.used

    def _show(self, end: int) -> None:
        self.used = end
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)


@dataclass
class Peer:
    """A model with a cache that holds the context."""

    model: Any
    cache: Any
    file: Path | None = None  # where blocks are read from, if it is to be cold
    rounds: list[dict[str, Any]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # of each round, [new tokens, words]

    @property
    def handle(self) -> Any:
        return getattr(self.model, "tiered_mem", None)

    def turn(self, num_new: int) -> None:
        """Decode, note how it went, and take the new tokens back out of the cache."""
        found: dict[str, Any] = {}
        if self.file is not None:
            found["raw_rates"] = [raw_read.best_rate(self.file)]
            found["cached_nbytes"] = cold.drop([self.file])
        before = None if self.handle is None else self.handle.stats()
        from_disk = cold.block_read_nbytes()
        found["seconds"], found["tokens"], logits = self.decode(num_new)
        found["nbytes_from_disk"] = (cold.block_read_nbytes() - from_disk) / num_new
        if before is not None:
            done = self.handle.stats() - before
            found["nbytes_read"] = done.nbytes_moved["nvme_to_hbm"] / num_new
            found["stall_seconds"] = done.stall_seconds / num_new
            found["hit_rate"] = done.num_hbm_hits / done.num_accesses
            found["num_prefetched"] = done.num_prefetched / num_new
            found["num_prefetched_used"] = done.num_prefetched_used / num_new
        if self.file is not None:
            found["raw_rates"].append(raw_read.best_rate(self.file))
        self.rounds.append(found)
        self.logits.append(logits)

    def decode(self, num_new: int) -> tuple[list[float], list[int], torch.Tensor]:
        """Decode greedily. Returns each token's seconds, the tokens, and all logits."""
        token, seconds, tokens, logits = FIRST_TOKEN, [], [], []
        for _ in range(num_new):
            start = time.perf_counter()
            with torch.inference_mode():
                last = self.model(
                    input_ids=torch.tensor([[token]]), past_key_values=self.cache
                ).logits[0, -1]
            token = int(last.argmax())
            seconds.append(time.perf_counter() - start)
            tokens.append(token)
            logits.append(last)
        self.cache.crop(-num_new)
        return seconds, tokens, torch.stack(logits)

    def peak_nbytes(self) -> int:
        """Return the most that the arena held while two tokens were decoded, as sampled."""
        most, over = [0], threading.Event()

        def sample() -> None:
            while not over.wait(SAMPLE_SECONDS):
                most.append(self.handle.runtime.nbytes_used()["hbm"])

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            self.decode(2)
        finally:
            over.set()
            sampler.join()
        return max(*most, self.handle.runtime.nbytes_used()["hbm"])


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
        for peer in peers.values():
            peer.decode(1)  # what is made at the first token isn't timed
        with common.OtherLoad() as other:
            for number in range(options.rounds):
                names = list(peers)
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    peers[name].turn(shape.num_new)
        results = {
            "machine": common.machine(options.dir) | {"other_cpus": other.cpus},
            "settings": vars(shape)
            | {
                "kv_nbytes": shape.kv_nbytes,
                "budgets": {name: int(share * shape.kv_nbytes) for name, share in SHARES.items()},
            },
            "summary": summarise(peers),
            "rounds": {name: peer.rounds for name, peer in peers.items()},
        }
        for peer in peers.values():
            if peer.handle is not None:
                peer.handle.close()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(results["summary"])
    common.write_results(options, results)


def make_peers(shape: Shape, work: Path) -> dict[str, Peer]:
    dynamic, preallocated = (DynamicCache(config=make_model(shape).config) for _ in range(2))
    preallocated.layers = [
        PreallocatedLayer(shape.num_tokens + shape.num_new) for _ in range(shape.num_layers)
    ]
    peers = {
        "dynamic": Peer(make_model(shape), dynamic),
        "preallocated": Peer(make_model(shape), preallocated),
    }
    for name, share in SHARES.items():
        model = make_model(shape)
        tiered_mem.tier_kv(model, int(share * shape.kv_nbytes), nvme=work / name)
        peers[name] = Peer(model, model.tiered_mem.cache())
    fill([peer.cache for peer in peers.values()], shape)
    for name in COLD:
        (peers[name].file,) = (work / name).rglob("data.mdb")
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


def summarise(peers: dict[str, Peer]) -> dict[str, Any]:
    seconds = {
        name: [statistics.median(r["seconds"]) for r in peer.rounds] for name, peer in peers.items()
    }
    tokens = [[r["tokens"] for r in peer.rounds] for peer in peers.values()]
    wanted = peers["dynamic"].logits
    return {
        "seconds_per_token": common.median_of(seconds),
        "to_preallocated": {
            name: common.paired_ratio(seconds[name], seconds["preallocated"]) for name in seconds
        },
        "cold": {name: summarise_cold(peers, name, seconds) for name in COLD},
        "peak_hbm_nbytes": {name: peers[name].peak_nbytes() for name in SHARES},
        "same_tokens": all(found == tokens[0] for found in tokens),
        "largest_logit_difference": max(
            float((got - want).abs().max())
            for peer in peers.values()
            for got, want in zip(peer.logits, wanted, strict=True)
        ),
        "logit_deviation": float(torch.cat(wanted).std()),
    }


def summarise_cold(
    peers: dict[str, Peer], name: str, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Compare with the limit of a cache whose blocks come from disk."""
    rounds = peers[name].rounds
    rates = [rate for peer in COLD for r in peers[peer].rounds for rate in r["raw_rates"]]

    def limits(near: bool) -> list[float]:
        return [
            max(whole, r["nbytes_read"] / (statistics.mean(r["raw_rates"]) if near else max(rates)))
            for whole, r in zip(seconds["preallocated"], rounds, strict=True)
        ]

    def median(field: str) -> float:
        return float(statistics.median(r[field] for r in rounds))

    return {
        "to_limit": common.paired_ratio(seconds[name], limits(near=True)),
        "to_strict_limit": common.paired_ratio(seconds[name], limits(near=False)),
        "mb_read_per_token": median("nbytes_read") / 1e6,
        "mb_from_disk_per_token": median("nbytes_from_disk") / 1e6,
        "hit_rate": median("hit_rate"),
        "prefetched_per_token": median("num_prefetched"),
        "prefetched_used_per_token": median("num_prefetched_used"),
        "stall_seconds_per_token": median("stall_seconds"),
        "raw_gb_per_second": [min(rates) / 1e9, max(rates) / 1e9],
    }


def report(summary: dict[str, Any]) -> None:
    rows = [
        [name, seconds, summary["to_preallocated"][name]]
        for name, seconds in summary["seconds_per_token"].items()
    ]
    common.print_table(rows, ["cache", "s/token", "to preallocated"])
    fields = summary["cold"][COLD[0]]
    rows = [[name, *(summary["cold"][budget][name] for budget in COLD)] for name in fields]
    common.print_table([[name, *map(_shown, values)] for name, *values in rows], ["budget", *COLD])
    rows = [[name, nbytes / 1e6] for name, nbytes in summary["peak_hbm_nbytes"].items()]
    common.print_table(rows, ["budget", "peak MB of HBM"])
    rows = [[key, value] for key, value in summary.items() if not isinstance(value, dict)]
    common.print_table([[key, _shown(value)] for key, value in rows], ["", "value"])


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return " to ".join(f"{v:.2f}" for v in value)
    return f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-3 else value


if __name__ == "__main__":
    main()

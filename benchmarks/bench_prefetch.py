"""Does prefetch ever cost? tokens/s against a predictor's recall, forced from 0 to 100 %.

The trained tiny-moe decodes text of its own, token by token, with a quarter of its experts in HBM
and no DRAM tier. The link is slowed until its transfers take as long as the computing: that is
where a prefetch has most to win and a wrong one most to spoil. Predictors:

- none, next-gate, previous-token: as shipped; none twice, to show how far equals differ here;
- oracle R%: knows the routes, recorded before on the same tokens. It names as many experts as the
  router takes; each is right with probability R, else a random wrong one. Ranks say nothing.

Every predictor has a model, runtime and store of its own, so what it has learned and cached stays
with it. All decode the same texts; they take turns of a few tokens, so that whatever else the
machine does meets all alike. The first text is for learning and not counted. Reported are medians
over turns of tokens/s and of the ratio to `none` in the same turn.

    python benchmarks/bench_prefetch.py [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from tiered_mem.policies.prefetch import Predictor, Route
from transformers import DynamicCache

import tiered_mem
from tiered_mem.hf.detect import find_experts

MODEL = Path(__file__).parent / "models" / "tiny-moe"
RECALLS = (0, 25, 50, 75, 100)
COUNTS = (
    "num_hbm_hits",
    "num_in_flight",
    "num_nvme_reads",
    "nbytes_missed",
    "num_prefetched",
    "num_prefetched_used",
    "stall_seconds",
)
Routes = list[list[list[int]]]  # [token][layer] -> expert ids


class Text(NamedTuple):
    """Token ids [length] and the routes that they take."""

    tokens: torch.Tensor
    routes: Routes


class Oracle(Predictor):
    """Predicts from recorded routes, and errs as often as it is told to."""

    name = "oracle"
    summary = "recorded routes with errors mixed in"
    source = "this benchmark"

    def __init__(self, recall: float) -> None:
        self._recall = recall
        self._random = random.Random(int(recall * 1000))
        self._guesses: Routes = []
        self.token = 0

    def learn(self, routes: Routes, num_experts: int) -> None:
        """Prepare the guesses for a text, so that none are made while it is timed."""
        self._guesses = [[self._guess(ids, num_experts) for ids in layers] for layers in routes]

    def _guess(self, ids: list[int], num_experts: int) -> list[int]:
        wrong = [index for index in range(num_experts) if index not in ids]
        mistakes = iter(self._random.sample(wrong, len(ids)))
        guess = [i if self._random.random() < self._recall else next(mistakes) for i in ids]
        self._random.shuffle(guess)
        return guess

    def predict(self, route: Route) -> Sequence[int]:
        token = self.token + (route.next_layer <= route.layer)
        return self._guesses[token][route.next_layer] if token < len(self._guesses) else ()


class Peer:
    """A model with its predictor."""

    def __init__(self, folder: Path, prefetch: str | Predictor, hbm: str) -> None:
        self.predictor = prefetch
        self.model = tiered_mem.from_pretrained(
            MODEL, hbm=hbm, dram=0, nvme=folder, prefetch=prefetch
        )
        self.handle = self.model.tiered_mem
        self.turns: list[dict[str, Any]] = []

    def decode(self, tokens: torch.Tensor, cache: DynamicCache) -> float:
        """Feed `tokens` [length] one by one. Returns tokens per second; keeps the counts."""
        before = self.handle.stats()
        first = cache.get_seq_length()
        started = time.perf_counter()
        for position in range(len(tokens)):
            if isinstance(self.predictor, Oracle):
                self.predictor.token = first + position
            self.model(tokens[None, position : position + 1], past_key_values=cache)
        seconds = time.perf_counter() - started
        counted = self.handle.stats() - before
        figures = counted.as_dict()
        self.turns.append({"seconds": round(seconds, 6)} | {key: figures[key] for key in COUNTS})
        return len(tokens) / seconds

    def turns_over(self, texts: list[Text], turn: int) -> Iterator[float]:
        """Decode `turn` tokens at each step, text after text. Yields tokens per second."""
        for text in texts:
            cache = DynamicCache(config=self.model.config)
            if isinstance(self.predictor, Oracle):
                self.predictor.learn(text.routes, self.model.config.num_local_experts)
            for tokens in text.tokens.split(turn):
                yield self.decode(tokens, cache)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        folder = Path(scratch)
        texts, compute_seconds = _texts(folder / "resident", options)
        peers = _peers(folder, options)
        missed = _missed_per_token(peers["none"], texts[0])
        rate = missed / compute_seconds / options.slowness
        for peer in peers.values():
            peer.handle.runtime.throttle("nvme_to_hbm", rate)
        measured = _measure(peers, texts, options.turn)
        where = common.machine(folder)
    results = {
        "machine": where,
        "settings": {
            "model": MODEL.name,
            "hbm": "25%",
            "dram": 0,
            "threads": 1,
            "num_tokens": sum(len(text.tokens) for text in texts[1:]),
            "tokens_per_turn": options.turn,
            "link_bytes_per_second": rate,
            "missed_bytes_per_token": missed,
            "compute_seconds_per_token": compute_seconds,
        },
        "summary": _summarise(peers, measured, options.turn),
        "tokens_per_second": measured,
        "counts": {name: peer.turns for name, peer in peers.items()},
    }
    for peer in peers.values():
        peer.handle.close()
    _print(results)
    common.write_results(options, results)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0], "prefetch")
    parser.add_argument("--texts", type=int, help="counted texts: 6, or 1 with --smoke")
    parser.add_argument("--num-tokens", type=int, help="tokens of a text: 160, or 8")
    parser.add_argument("--turn", type=int, help="tokens of a turn: 16, or 4")
    parser.add_argument("--recalls", type=int, nargs="*", help="of the oracle, in %%")
    parser.add_argument(
        "--slowness", type=float, default=1.0, help="of the link: time of transfers by computing"
    )
    options = parser.parse_args()
    full = not options.smoke
    options.texts = options.texts or (6 if full else 1)
    options.num_tokens = options.num_tokens or (160 if full else 8)
    options.turn = options.turn or (16 if full else 4)
    if options.recalls is None:
        options.recalls = RECALLS if full else (0, 100)
    return options


def _texts(folder: Path, options: argparse.Namespace) -> tuple[list[Text], float]:
    """Let the model write texts; return them with their routes, and the model's speed.

    The speed is seconds per token with every expert in HBM: what can't be hidden.
    """
    peer = Peer(folder, "none", "100%")
    peer.handle.fill()
    texts = []
    length = {"min_new_tokens": options.num_tokens, "max_new_tokens": options.num_tokens}
    for number in range(options.texts + 1):
        torch.manual_seed(number)
        start = torch.randint(1, peer.model.config.vocab_size, (1, 1))
        tokens = peer.model.generate(start, do_sample=True, **length)[0, : options.num_tokens]
        texts.append(Text(tokens, _record(peer, tokens)))
    speeds = list(peer.turns_over(texts, options.turn))
    peer.handle.close()
    return texts, 1 / statistics.median(speeds)


def _record(peer: Peer, tokens: torch.Tensor) -> Routes:
    experts = find_experts(peer.model)
    routes: Routes = [[[] for _ in experts] for _ in tokens]
    token = 0

    def note(layer: int, args: tuple[Any, ...]) -> None:
        routes[token][layer] = args[1][0].tolist()

    handles = [
        e.module.register_forward_pre_hook(lambda _, args, layer=e.layer: note(layer, args))
        for e in experts
    ]
    cache = DynamicCache(config=peer.model.config)
    for token in range(len(tokens)):
        peer.model(tokens[None, token : token + 1], past_key_values=cache)
    for handle in handles:
        handle.remove()
    return routes


def _peers(folder: Path, options: argparse.Namespace) -> dict[str, Peer]:
    names = ("none", "next-gate", "previous-token")
    predictors: dict[str, str | Predictor] = {name: name for name in names}
    predictors["none again"] = "none"
    predictors |= {f"oracle {recall}%": Oracle(recall / 100) for recall in options.recalls}
    return {
        name: Peer(folder / name.replace(" ", "-").rstrip("%"), predictor, "25%")
        for name, predictor in predictors.items()
    }


def _missed_per_token(none: Peer, text: Text) -> float:
    """Return the bytes that a token misses without prefetch."""
    none.decode(text.tokens, DynamicCache(config=none.model.config))
    return float(none.turns.pop()["nbytes_missed"] / len(text.tokens))


def _measure(peers: dict[str, Peer], texts: list[Text], turn: int) -> dict[str, list[float]]:
    running = {name: peer.turns_over(texts, turn) for name, peer in peers.items()}
    turns_per_text = -(-len(texts[0].tokens) // turn)
    measured = common.interleave(
        {name: running[name].__next__ for name in peers}, turns_per_text * len(texts)
    )
    for peer in peers.values():
        del peer.turns[:turns_per_text]
    return {name: speeds[turns_per_text:] for name, speeds in measured.items()}


def _summarise(
    peers: dict[str, Peer], measured: dict[str, list[float]], turn: int
) -> dict[str, dict[str, float]]:
    speeds = common.median_of(measured)
    summary = {}
    for name, peer in peers.items():
        total = {
            key: sum(counts[key] for counts in peer.turns)
            for key in ("num_prefetched", "num_prefetched_used", "num_nvme_reads", "stall_seconds")
        }
        missing = total["num_prefetched_used"] + total["num_nvme_reads"]
        summary[name] = {
            "tokens_per_second": speeds[name],
            "ratio_to_none": common.paired_ratio(measured[name], measured["none"]),
            "prefetched_per_token": total["num_prefetched"] / len(peer.turns) / turn,
            "prefetch_precision": total["num_prefetched_used"] / max(1, total["num_prefetched"]),
            "prefetch_recall": total["num_prefetched_used"] / max(1, missing),
            "stall_share": total["stall_seconds"] / sum(c["seconds"] for c in peer.turns),
        }
    return summary


def _print(results: dict[str, Any]) -> None:
    summary = results["summary"]
    header = ["predictor", *next(iter(summary.values()))]
    common.print_table([[name, *values.values()] for name, values in summary.items()], header)
    ratios = {name: values["ratio_to_none"] for name, values in summary.items()}
    noise = ratios.pop("none again")
    worst = min(ratios, key=ratios.__getitem__)
    print(f"\nnext-gate {ratios['next-gate']} of none; worst: {worst} {ratios[worst]}")
    print(f"none against itself: {noise}")


if __name__ == "__main__":
    main()

"""Does prefetch ever cost? tokens/s against a predictor's recall, forced from 0 to 100 %.

The trained tiny-moe decodes text of its own, token by token, with a quarter of its experts in HBM
and no DRAM tier. The link is slowed until its transfers take as long as the computing: that is
where a prefetch has most to win and a wrong one most to spoil. Predictors:

- none, next-gate, previous-token: as shipped;
- oracle R%: knows the routes, recorded before on the same tokens. It names as many experts as the
  router takes; each is right with probability R, else a random wrong one. Ranks say nothing.

Every predictor has a model, runtime and store of its own, so what it has learned and cached stays
with it. Rounds are interleaved on the same text; the first is for learning and not counted.
Reported are medians over rounds of tokens/s and of the ratio to `none` in the same round.

    python benchmarks/bench_prefetch.py [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from tiered_mem.policies.prefetch import Predictor, Route
from transformers import DynamicCache

import tiered_mem
from tiered_mem.hf.detect import find_experts

MODEL = Path(__file__).parent / "models" / "tiny-moe"
RECALLS = (0, 20, 40, 50, 60, 80, 100)
Routes = list[list[list[int]]]  # [token][layer] -> expert ids


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
        self.rounds: list[dict[str, Any]] = []

    def decode(self, tokens: torch.Tensor, routes: Routes) -> float:
        """Feed `tokens` [length] one by one. Returns tokens per second; keeps the counts."""
        if isinstance(self.predictor, Oracle):
            self.predictor.learn(routes, self.model.config.num_local_experts)
        cache = DynamicCache(config=self.model.config)
        before = self.handle.stats()
        started = time.perf_counter()
        for position in range(len(tokens)):
            if isinstance(self.predictor, Oracle):
                self.predictor.token = position
            self.model(tokens[None, position : position + 1], past_key_values=cache)
        seconds = time.perf_counter() - started
        counted = self.handle.stats() - before
        self.rounds.append({"seconds": seconds, **counted.as_dict()})
        return len(tokens) / seconds


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        folder = Path(scratch)
        texts, routes, compute_seconds = _texts(folder / "resident", options)
        peers = _peers(folder, options)
        rate = options.rate or _rate(peers["none"], texts[0], compute_seconds)
        for peer in peers.values():
            peer.handle.runtime.throttle("nvme_to_hbm", rate)
        measured = _measure(peers, texts, routes)
        where = common.machine(folder)
    results = {
        "machine": where,
        "settings": {
            "model": MODEL.name,
            "hbm": "25%",
            "dram": 0,
            "threads": 1,
            "num_tokens": options.num_tokens,
            "num_rounds": options.rounds,
            "link_bytes_per_second": rate,
            "compute_seconds_per_token": compute_seconds,
        },
        "summary": _summarise(peers, measured, options.num_tokens),
        "tokens_per_second": measured,
        "counts": {name: peer.rounds for name, peer in peers.items()},
    }
    for peer in peers.values():
        peer.handle.close()
    _print(results)
    common.write_results(options, results)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0], "prefetch")
    parser.add_argument("--rounds", type=int, help="counted rounds: 9, or 1 with --smoke")
    parser.add_argument("--num-tokens", type=int, help="tokens of a round: 160, or 8")
    parser.add_argument(
        "--rate",
        type=float,
        help="bytes/s of the link (default: transfers take as long as computing)",
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.smoke else 9)
    options.num_tokens = options.num_tokens or (8 if options.smoke else 160)
    options.recalls = (0, 100) if options.smoke else RECALLS
    return options


def _texts(
    folder: Path, options: argparse.Namespace
) -> tuple[list[torch.Tensor], list[Routes], float]:
    """Let the model write a text for each round; return these, their routes, and its speed.

    The speed is seconds per token with every expert in HBM: what can't be hidden.
    """
    peer = Peer(folder, "none", "100%")
    peer.handle.fill()
    texts, routes = [], []
    for number in range(options.rounds + 1):
        torch.manual_seed(number)
        start = torch.randint(1, peer.model.config.vocab_size, (1, 1))
        text = peer.model.generate(
            start,
            do_sample=True,
            min_new_tokens=options.num_tokens,
            max_length=options.num_tokens + 1,
        )[0, : options.num_tokens]
        texts.append(text)
        routes.append(_record(peer, texts[-1]))
    speeds = [peer.decode(text, []) for text in texts]
    peer.handle.close()
    return texts, routes, 1 / sorted(speeds)[len(speeds) // 2]


def _record(peer: Peer, text: torch.Tensor) -> Routes:
    experts = find_experts(peer.model)
    routes: Routes = [[[] for _ in experts] for _ in text]
    token = 0

    def note(layer: int, args: tuple[Any, ...]) -> None:
        routes[token][layer] = args[1][0].tolist()

    handles = [
        e.module.register_forward_pre_hook(lambda _, args, layer=e.layer: note(layer, args))
        for e in experts
    ]
    cache = DynamicCache(config=peer.model.config)
    for token in range(len(text)):
        peer.model(text[None, token : token + 1], past_key_values=cache)
    for handle in handles:
        handle.remove()
    return routes


def _peers(folder: Path, options: argparse.Namespace) -> dict[str, Peer]:
    predictors: dict[str, str | Predictor] = {
        name: name for name in ("none", "next-gate", "previous-token")
    }
    predictors |= {f"oracle {recall}%": Oracle(recall / 100) for recall in options.recalls}
    return {
        name: Peer(folder / name.replace(" ", "-").rstrip("%"), predictor, "25%")
        for name, predictor in predictors.items()
    }


def _rate(none: Peer, text: torch.Tensor, compute_seconds: float) -> float:
    """Return the bytes per second at which a token's missed bytes take as long as computing it."""
    none.decode(text, [])
    missed = none.rounds.pop()["nbytes_missed"] / len(text)
    return float(missed / compute_seconds)


def _measure(
    peers: dict[str, Peer], texts: list[torch.Tensor], routes: list[Routes]
) -> dict[str, list[float]]:
    def next_text(name: str) -> float:
        number = len(peers[name].rounds)
        print(f"round {number} of {len(texts) - 1}: {name}", file=sys.stderr)
        return peers[name].decode(texts[number], routes[number])

    turns = {name: functools.partial(next_text, name) for name in peers}
    measured = common.interleave(turns, len(texts))
    for peer in peers.values():
        del peer.rounds[0]  # for learning
    return {name: speeds[1:] for name, speeds in measured.items()}


def _summarise(
    peers: dict[str, Peer], measured: dict[str, list[float]], num_tokens: int
) -> dict[str, dict[str, float]]:
    speeds = common.median_of(measured)
    summary = {}
    for name, peer in peers.items():
        total = {
            key: sum(counts[key] for counts in peer.rounds)
            for key in ("num_prefetched", "num_prefetched_used", "num_nvme_reads", "stall_seconds")
        }
        missing = total["num_prefetched_used"] + total["num_nvme_reads"]
        summary[name] = {
            "tokens_per_second": speeds[name],
            "ratio_to_none": common.paired_ratio(measured[name], measured["none"]),
            "prefetched_per_token": total["num_prefetched"] / len(peer.rounds) / num_tokens,
            "prefetch_precision": total["num_prefetched_used"] / max(1, total["num_prefetched"]),
            "prefetch_recall": total["num_prefetched_used"] / max(1, missing),
            "stall_share": total["stall_seconds"] / sum(c["seconds"] for c in peer.rounds),
        }
    return summary


def _print(results: dict[str, Any]) -> None:
    summary = results["summary"]
    header = ["predictor", *next(iter(summary.values()))]
    common.print_table([[name, *values.values()] for name, values in summary.items()], header)
    worst = min(values["ratio_to_none"] for values in summary.values())
    print(f"\nworst ratio to none {worst}, next-gate {summary['next-gate']['ratio_to_none']}")


if __name__ == "__main__":
    main()

"""Flat requests from a seed, of the three sorts that caches of a model meet."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
from blocks import expert

Keys = npt.NDArray[np.uint64]

NUM_SLOTS = [8, 16, 32, 64, 128, 256, 512, 1024]


def zipf(num_requests: int = 20_000, num_keys: int = 3000) -> Keys:
    """Independent requests by Zipf's law."""
    rng = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(num_keys)]
    return np.array(rng.choices(range(num_keys), weights, k=num_requests), np.uint64)


def routes(num_tokens: int = 400, num_layers: int = 12, num_experts: int = 128) -> Keys:
    """Token after token through all layers, four experts each, some of them the last token's."""
    rng = random.Random(2)
    weights = [1 / (rank + 2) for rank in range(num_experts)]
    orders = [rng.sample(range(num_experts), num_experts) for _ in range(num_layers)]
    last: list[list[int]] = [[] for _ in range(num_layers)]
    keys = []
    for _ in range(num_tokens):
        for layer in range(num_layers):
            chosen = {i for i in last[layer] if rng.random() < 0.4}
            while len(chosen) < 4:
                chosen.add(orders[layer][rng.choices(range(num_experts), weights)[0]])
            last[layer] = sorted(chosen)
            keys += [expert(layer, i) for i in last[layer]]
    return np.array(keys, np.uint64)


def prefixes(num_requests: int = 700, num_chats: int = 60) -> Keys:
    """Chats that take turns; each asks for its blocks so far, and for some new ones."""
    rng = random.Random(3)
    chats = [[0, 1, 2] for _ in range(num_chats)]  # a prompt that all share
    num_blocks, keys = 3, []
    for _ in range(num_requests):
        number = int(rng.paretovariate(0.7)) % num_chats
        if len(chats[number]) > 60:
            chats[number] = [0, 1, 2]
        new = rng.randrange(1, 8)
        chats[number] += range(num_blocks, num_blocks + new)
        num_blocks += new
        keys += chats[number]
    return np.array(keys, np.uint64)


TRACES: dict[str, Keys] = {"zipf": zipf(), "routes": routes(), "prefixes": prefixes()}

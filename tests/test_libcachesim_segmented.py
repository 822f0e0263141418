"""slru, 2q, s3-fifo, lirs, lfu and w-tinylfu beside libCacheSim (GPL-3: a cross-check, no part of
the package). Equal counts where the definitions agree; where they don't, plain Python shows that
nothing else differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plain_policies import lfu, w_tiny_lfu_of_libcachesim
from test_policies_segmented import ARRAY, KEYS, skewed_keys

from tiered_mem import _core

libcachesim = pytest.importorskip("libcachesim", reason="optional cross-check (GPL-3)")

# Four divides them: its SLRU leaves a remainder empty.
NUM_SLOTS = [8, 16, 32, 64, 128, 256, 512, 1024]
# Below, its small queue has room for one block or none, and it admits nothing.
S3_FIFO_SLOTS = [20, 24, 32, 64, 128, 256, 512, 1024]


def misses_of(cache: Any, keys: list[int], nbytes: int = 1) -> int:
    misses = 0
    for number, key in enumerate(keys):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = key, nbytes, number
        misses += not cache.get(request)
    return misses


@pytest.mark.parametrize(
    ("policy", "peer", "sizes"),
    [("slru", "SLRU", NUM_SLOTS), ("2q", "TwoQ", NUM_SLOTS), ("s3-fifo", "S3FIFO", S3_FIFO_SLOTS)],
)
def test_equal_misses(policy: str, peer: str, sizes: list[int]) -> None:
    for num_slots in sizes:
        cache = getattr(libcachesim, peer)(num_slots, hashpower=12)
        assert _core.count_misses(policy, ARRAY, num_slots) == misses_of(cache, KEYS)


def test_lirs_within_0_3_points() -> None:
    """It makes room among the LIR blocks when an HIR block outside the stack is hit."""
    for num_slots in NUM_SLOTS:
        misses = misses_of(libcachesim.LIRS(num_slots, hashpower=12), KEYS)
        assert abs(_core.count_misses("lirs", ARRAY, num_slots) - misses) <= 0.003 * len(KEYS)


def test_lfu_without_its_aging() -> None:
    for num_slots in NUM_SLOTS:
        cache = libcachesim.LFU(num_slots, hashpower=12)
        assert lfu(KEYS, num_slots, aging=False) == misses_of(cache, KEYS)


@pytest.mark.parametrize("num_slots", [500, 1000, 1500, 2000])
def test_w_tinylfu_as_libcachesim_defines_it(num_slots: int) -> None:
    # Its filter has counters by the byte: with blocks of 64 bytes they hardly ever collide.
    keys = skewed_keys(20_000, 6000, seed=6)
    misses = misses_of(libcachesim.WTinyLFU(64 * num_slots, hashpower=12), keys, 64)
    assert abs(w_tiny_lfu_of_libcachesim(keys, num_slots) - misses) <= 0.0005 * len(keys)
    # The difference in all, on these keys.
    ours = _core.count_misses("w-tinylfu", np.array(keys, np.uint64), num_slots)
    assert abs(ours - misses) <= 0.01 * len(keys)

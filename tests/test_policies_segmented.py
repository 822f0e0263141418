"""slru, 2q, s3-fifo, lirs, lfu and w-tinylfu: miss counts beside plain Python, and fixed ones."""

from __future__ import annotations

import bisect
import itertools
import random

import numpy as np
import pytest
from blocks import expert
from plain_policies import PLAIN, w_tiny_lfu

from tiered_mem import _core


def skewed_keys(num_requests: int, num_keys: int, seed: int = 5) -> list[int]:
    """Ranks by Zipf's law; a tenth of the requests go to a window that moves over the keys."""
    rng = random.Random(seed)
    order = rng.sample(range(num_keys), num_keys)
    cumulated = list(itertools.accumulate(1 / (rank + 1) for rank in range(num_keys)))
    keys = []
    for number in range(num_requests):
        rank = bisect.bisect_left(cumulated, rng.random() * cumulated[-1])
        if rng.random() < 0.1:
            rank = (number // 8 + rng.randrange(32)) % num_keys
        keys.append(expert(rank % 4, order[rank]))
    return keys


KEYS = skewed_keys(20_000, 3000)
ARRAY = np.array(KEYS, np.uint64)
NUM_SLOTS = [1, 2, 3, 8, 21, 64, 250, 1000]

#: Misses among the 20,000 keys, by number of slots.
GOLDEN = {
    "slru": [19653, 19320, 18967, 15119, 13271, 10819, 7785, 4444],
    "2q": [19653, 18296, 17335, 15582, 13371, 11052, 7758, 4769],
    "s3-fifo": [19653, 17753, 16870, 14767, 12853, 10641, 7676, 4356],
    "lirs": [19653, 18328, 17438, 15177, 13184, 10952, 8135, 4673],
    "lfu": [19653, 19300, 17882, 15716, 13869, 11346, 7946, 4462],
    "w-tinylfu": [19653, 18513, 17455, 15199, 12986, 10539, 7759, 4520],
}


@pytest.mark.parametrize("num_slots", NUM_SLOTS)
@pytest.mark.parametrize("policy", [name for name in PLAIN if name != "w-tinylfu"])
def test_misses_are_those_of_plain_python(policy: str, num_slots: int) -> None:
    expected = PLAIN[policy](KEYS, num_slots)
    assert _core.count_misses(policy, ARRAY, num_slots) == expected


@pytest.mark.parametrize("num_slots", NUM_SLOTS)
def test_the_sketch_costs_w_tinylfu_less_than_0_3_points(num_slots: int) -> None:
    misses = _core.count_misses("w-tinylfu", ARRAY, num_slots)
    assert abs(misses - w_tiny_lfu(KEYS, num_slots)) <= 0.003 * len(KEYS)


@pytest.mark.parametrize("policy", PLAIN)
def test_golden_miss_counts(policy: str) -> None:
    assert [_core.count_misses(policy, ARRAY, n) for n in NUM_SLOTS] == GOLDEN[policy]


@pytest.mark.parametrize("policy", PLAIN)
def test_sizes_in_bytes_scale(policy: str) -> None:
    """Slots of 3 bytes in three times the budget are the same cache."""
    for num_slots in NUM_SLOTS:
        nbytes = np.full(len(ARRAY), 3, np.uint64)
        misses, missed_nbytes = _core.count_misses(policy, ARRAY, 3 * num_slots, nbytes)
        assert misses == _core.count_misses(policy, ARRAY, num_slots)
        assert missed_nbytes == 3 * misses

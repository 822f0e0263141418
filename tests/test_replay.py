"""The count-only replay, and lru, fifo, clock, sieve, arc and belady: beside plain Python, and
fixed counts (which are libCacheSim's too: test_libcachesim.py).
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from flat_traces import NUM_SLOTS, TRACES
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem import _core
from tiered_mem.errors import ConfigError, PolicyError
from tiered_mem.policy import EvictionPolicy

Keys = Sequence[int]
Queue = OrderedDict[int, bool]  # oldest first; True: used since it was last looked at


def plain_lru(keys: Keys, num_slots: int, reorder: bool = True) -> int:
    queue, misses = Queue(), 0
    for key in keys:
        if key in queue:
            if reorder:
                queue.move_to_end(key)
            continue
        misses += 1
        if len(queue) == num_slots:
            queue.popitem(last=False)
        queue[key] = False
    return misses


def plain_fifo(keys: Keys, num_slots: int) -> int:
    return plain_lru(keys, num_slots, reorder=False)


def plain_clock(keys: Keys, num_slots: int) -> int:
    queue, misses = Queue(), 0
    for key in keys:
        if key in queue:
            queue[key] = True
            continue
        misses += 1
        while len(queue) == num_slots:
            oldest, used = queue.popitem(last=False)
            if used:
                queue[oldest] = False
        queue[key] = False
    return misses


def plain_sieve(keys: Keys, num_slots: int) -> int:
    order: list[int] = []
    used, hand, misses = set[int](), 0, 0
    for key in keys:
        if key in order:
            used.add(key)
            continue
        misses += 1
        if len(order) == num_slots:
            while (at_hand := order[hand]) in used:
                used.remove(at_hand)
                hand = (hand + 1) % num_slots
            del order[hand]
            if hand == len(order):  # it was at the newest, and begins with the oldest again
                hand = 0
        order.append(key)
    return misses


def plain_arc(keys: Keys, num_slots: int) -> int:
    once, again, lost_once, lost_again = (Queue() for _ in range(4))
    target, misses = 0.0, 0

    def replace(key: int) -> None:
        if once and (
            len(once) > target or (key in lost_again and len(once) == target) or not again
        ):
            lost_once[once.popitem(last=False)[0]] = False
        else:
            lost_again[again.popitem(last=False)[0]] = False

    for key in keys:
        if key in once or key in again:
            once.pop(key, None)
            again.pop(key, None)
            again[key] = False
            continue
        misses += 1
        full = len(once) + len(again) == num_slots
        if key in lost_once or key in lost_again:
            if key in lost_once:
                target = min(num_slots, target + max(1.0, len(lost_again) / len(lost_once)))
            else:
                target = max(0.0, target - max(1.0, len(lost_once) / len(lost_again)))
            if full:
                replace(key)
            lost_once.pop(key, None)
            lost_again.pop(key, None)
            again[key] = False
            continue
        if len(once) == num_slots:
            once.popitem(last=False)
        else:
            if len(once) + len(lost_once) == num_slots:
                lost_once.popitem(last=False)
            elif sum(map(len, (once, again, lost_once, lost_again))) == 2 * num_slots:
                lost_again.popitem(last=False)
            if full:
                replace(key)
        once[key] = False
    return misses


def plain_belady(keys: Keys, num_slots: int) -> int:
    uses: dict[int, deque[int]] = {}
    for position, key in enumerate(keys):
        uses.setdefault(key, deque()).append(position)
    resident, misses = set[int](), 0
    for key in keys:
        uses[key].popleft()
        if key in resident:
            continue
        misses += 1
        if len(resident) == num_slots:
            resident.remove(max(resident, key=lambda k: uses[k][0] if uses[k] else len(keys)))
        resident.add(key)
    return misses


PLAIN: dict[str, Callable[[Keys, int], int]] = {
    "lru": plain_lru,
    "fifo": plain_fifo,
    "clock": plain_clock,
    "sieve": plain_sieve,
    "arc": plain_arc,
    "belady": plain_belady,
}

#: Misses by trace, policy and number of slots (flat_traces.NUM_SLOTS).
GOLDEN = {
    ("zipf", "lru"): [17176, 15553, 13695, 11918, 9915, 7937, 5953, 3986],
    ("zipf", "fifo"): [17517, 16222, 14643, 12885, 10972, 8966, 6862, 4665],
    ("zipf", "clock"): [16940, 15223, 13412, 11627, 9621, 7719, 5793, 3890],
    ("zipf", "sieve"): [14616, 12872, 11167, 9695, 8142, 6631, 5207, 3710],
    ("zipf", "arc"): [14677, 13131, 11442, 9818, 8250, 6728, 5275, 3765],
    ("zipf", "belady"): [13078, 11310, 9576, 7878, 6310, 4831, 3531, 2626],
    ("routes", "lru"): [19200, 19200, 19200, 10656, 8956, 6873, 4494, 2195],
    ("routes", "fifo"): [19200, 19200, 19200, 11804, 9660, 7688, 5279, 2620],
    ("routes", "clock"): [19200, 19200, 19200, 10518, 8920, 6826, 4495, 2195],
    ("routes", "sieve"): [19200, 19200, 19200, 17373, 14406, 10692, 6789, 2305],
    ("routes", "arc"): [19200, 19200, 19200, 10960, 9505, 6884, 4682, 2136],
    ("routes", "belady"): [16436, 13434, 9694, 7431, 5564, 3867, 2420, 1532],
    ("prefixes", "lru"): [20685, 20127, 18284, 13204, 9003, 5233, 3540, 2843],
    ("prefixes", "fifo"): [20703, 20210, 18529, 13876, 9556, 5883, 3898, 3124],
    ("prefixes", "clock"): [20651, 20031, 17994, 12919, 8443, 5295, 3836, 2982],
    ("prefixes", "sieve"): [18810, 18480, 17974, 17928, 17296, 15380, 13060, 6164],
    ("prefixes", "arc"): [18590, 17660, 15831, 11583, 8389, 5400, 3779, 2982],
    ("prefixes", "belady"): [17637, 15568, 12218, 8294, 5438, 3575, 2748, 2739],
}


def count(policy: str, keys: Keys, num_slots: int) -> int:
    return _core.count_misses(policy, np.array(keys, np.uint64), num_slots)


@pytest.mark.parametrize(("trace", "policy"), GOLDEN)
def test_golden_miss_counts(trace: str, policy: str) -> None:
    counts = [_core.count_misses(policy, TRACES[trace], n) for n in NUM_SLOTS]
    assert counts == GOLDEN[trace, policy]


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8, 64, 300])
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("policy", PLAIN)
def test_misses_are_those_of_plain_python(policy: str, trace: str, num_slots: int) -> None:
    keys = TRACES[trace][:5000].tolist()
    assert count(policy, keys, num_slots) == PLAIN[policy](keys, num_slots)


@pytest.mark.parametrize("policy", PLAIN)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 9), max_size=120), num_slots=st.integers(1, 8))
def test_misses_of_any_keys(policy: str, keys: list[int], num_slots: int) -> None:
    assert count(policy, keys, num_slots) == PLAIN[policy](keys, num_slots)


def fewest_misses(keys: Keys, num_slots: int) -> int:
    """Brute force: every victim at every miss."""
    fewest = {frozenset[int](): 0}
    for key in keys:
        after: dict[frozenset[int], int] = {}
        for resident, misses in fewest.items():
            if key in resident:
                choices, cost = [resident], misses
            elif len(resident) < num_slots:
                choices, cost = [resident | {key}], misses + 1
            else:
                choices, cost = [resident - {gone} | {key} for gone in resident], misses + 1
            for choice in choices:
                after[choice] = min(cost, after.get(choice, cost))
        fewest = after
    return min(fewest.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 6), max_size=40), num_slots=st.integers(1, 4))
def test_belady_misses_least_of_all(keys: list[int], num_slots: int) -> None:
    assert count("belady", keys, num_slots) == fewest_misses(keys, num_slots)


def test_belady_needs_the_future() -> None:
    for spec in ("belady", "per-layer(belady)"):
        with pytest.raises(ConfigError, match="simulator only"):
            _core.Residency(4096, spec)
        with pytest.raises(ConfigError, match="simulator only"):
            _core.check_eviction(spec)
    with pytest.raises(ConfigError, match="built-in"):
        _core.register_eviction("belady", object)


@pytest.mark.parametrize("policy", [*PLAIN, "per-layer(lru)"])
def test_sizes_in_bytes_scale(policy: str) -> None:
    keys, nbytes = TRACES["prefixes"], 3_000_000
    for num_slots in (1, 2, 8, 64):
        misses = _core.count_misses(policy, keys, num_slots)
        sizes = np.full(len(keys), nbytes)
        # The rest of the budget is too small for one block more.
        budget = num_slots * nbytes + nbytes - 1
        if policy == "arc":  # whose ghosts would have room in it
            budget = num_slots * nbytes
        found = _core.count_misses(policy, keys, budget, sizes)
        assert found == (misses, misses * nbytes)


def test_mixed_sizes_evict_until_it_fits() -> None:
    rng = random.Random(4)
    sizes = {key: rng.randrange(1, 30) for key in range(50)}
    keys = [rng.randrange(50) for _ in range(4000)]
    budget, resident, missed = 25, OrderedDict[int, int](), []
    for key in keys:
        if key in resident:
            resident.move_to_end(key)
            continue
        missed.append(key)
        if sizes[key] > budget:
            continue  # passes by
        while sum(resident.values()) + sizes[key] > budget:
            resident.popitem(last=False)
        resident[key] = sizes[key]
    nbytes = [sizes[key] for key in keys]
    expected = len(missed), sum(sizes[key] for key in missed)
    assert _core.count_misses("lru", keys, budget, nbytes) == expected


def test_partitions_of_one_layer_are_the_policy_itself() -> None:
    for num_slots in NUM_SLOTS:
        alone = _core.count_misses("arc", TRACES["zipf"], num_slots)
        assert _core.count_misses("per-layer(arc)", TRACES["zipf"], num_slots) == alone


class Stack(EvictionPolicy):
    """A plug-in: last in, first out."""

    name = "stack"

    def __init__(self) -> None:
        self.keys: list[int] = []

    def insert(self, key: int, nbytes: int) -> None:
        self.keys.append(key)

    def touch(self, key: int) -> None:
        pass

    def erase(self, key: int) -> None:
        self.keys.remove(key)

    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        return self.keys.pop()


class Raising(Stack):
    def touch(self, key: int) -> None:
        raise ValueError("no touching")


class Confused(Stack):
    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        return 12345


def test_plug_ins_replay_too() -> None:
    _core.register_eviction("stack", Stack)
    keys = TRACES["zipf"][:4000]
    resident, stack, misses = set[int](), list[int](), 0
    for key in keys.tolist():
        if key in resident:
            continue
        misses += 1
        if len(stack) == 8:
            resident.remove(stack.pop())
        stack.append(key)
        resident.add(key)
    assert _core.count_misses("stack", keys, 8) == misses
    assert _core.count_misses("stack", keys, 8, np.ones(len(keys))) == (misses, misses)


@pytest.mark.parametrize(
    ("plug_in", "message"), [(Raising, "'bad'.*no touching"), (Confused, "'bad'.*12345")]
)
def test_a_plug_in_that_misbehaves_is_named(plug_in: type[Stack], message: str) -> None:
    _core.register_eviction("bad", plug_in)
    with pytest.raises(PolicyError, match=message):
        _core.count_misses("bad", [1, 2, 3, 1, 2], 2)


def test_errors_of_use_are_named() -> None:
    for arguments, message in [
        (("magic", [1], 8), "magic"),
        (("lru", [1], 0), "at least 1"),
        (("lru", [1, 2**64 - 1], 8), "names no block"),
        (("lru", [1, 2], 8, [1]), "as many sizes"),
        (("lru", [1, 2], 8, [1, 0]), "has bytes"),
    ]:
        with pytest.raises(ConfigError, match=message):
            _core.count_misses(*arguments)
    assert _core.count_misses("lru", [], 8) == 0

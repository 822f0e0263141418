"""Policies for experts: counts against plain Python, small tiers, sizes, pins."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import pytest
from blocks import PAGE, expert
from test_core_residency import TRACES, Trace, misses_of_core

from tiered_mem import _core

POLICIES = ["adaptive", "hint-aware", "random", "lfru", "gdsf", "least-stale"]


class PlainGdsf:
    """Every block's value in a dict; the lowest goes."""

    START = 256 * 1024

    def __init__(self) -> None:
        self.clock, self.now = 0.0, 0
        self.uses: dict[int, int] = {}
        self.value: dict[int, tuple[float, int]] = {}

    def insert(self, key: int) -> None:
        self.uses[key] = 0
        self.touch(key)

    def touch(self, key: int) -> None:
        self.uses[key] += 1
        self.now += 1
        gain = (self.START + PAGE) / PAGE
        self.value[key] = (self.clock + self.uses[key] * gain, self.now)

    def evict(self, pinned: Iterable[int]) -> int:
        pins = set(pinned)
        victim = min((key for key in self.value if key not in pins), key=self.value.__getitem__)
        self.clock = max(self.clock, self.value.pop(victim)[0])
        return victim


class PlainLfru:
    """Two lists: privileged by recency (newest last), the others by uses."""

    def __init__(self, num_slots: int) -> None:
        self.room, self.now, self.since_aging = num_slots // 2, 0, 0
        self.uses: dict[int, int] = {}
        self.privileged: list[int] = []
        self.others: dict[int, int] = {}  # the time of the last use

    def insert(self, key: int) -> None:
        self.uses[key] = 1
        self.rank(key)
        self.age()

    def rank(self, key: int) -> None:
        self.now += 1
        self.others[key] = self.now

    def touch(self, key: int) -> None:
        self.uses[key] += 1
        if key in self.privileged:
            self.privileged.remove(key)
            self.privileged.append(key)
        else:
            self.rank(key)
            self.promote(key)
        self.age()

    def promote(self, key: int) -> None:
        if self.room == 0:
            return
        if len(self.privileged) == self.room:
            if self.uses[self.privileged[0]] > self.uses[key]:
                return
            self.rank(self.privileged.pop(0))
        del self.others[key]
        self.privileged.append(key)

    def age(self) -> None:
        self.since_aging += 1
        if self.since_aging >= 10 * len(self.uses):
            self.since_aging = 0
            self.uses = {key: math.ceil(uses / 2) for key, uses in self.uses.items()}

    def evict(self, pinned: Iterable[int]) -> int:
        pins = set(pinned)
        order = sorted(self.others, key=lambda key: (self.uses[key], self.others[key]))
        victim = next(key for key in [*order, *self.privileged] if key not in pins)
        self.others.pop(victim, None)
        if victim in self.privileged:
            self.privileged.remove(victim)
        del self.uses[victim]
        return victim


PlainPolicy = PlainGdsf | PlainLfru
MODELS: dict[str, Callable[[int], PlainPolicy]] = {
    "gdsf": lambda num_slots: PlainGdsf(),
    "lfru": PlainLfru,
}


def misses_of_model(trace: Trace, num_slots: int, eviction: str) -> int:
    policy, resident, misses = MODELS[eviction](num_slots), set[int](), 0
    for event in trace:
        missing = [key for key in event if key not in resident]
        for key in missing:
            if len(resident) == num_slots:
                resident.remove(policy.evict(event))
            policy.insert(key)
            resident.add(key)
        for key in event:
            if key not in missing:
                policy.touch(key)
        misses += len(missing)
    return misses


@pytest.mark.parametrize("num_slots", [8, 17, 64, 200])
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("eviction", MODELS)
def test_misses_are_those_of_plain_python(eviction: str, trace: str, num_slots: int) -> None:
    events = TRACES[trace][:4000]
    assert misses_of_core(events, num_slots, eviction) == misses_of_model(
        events, num_slots, eviction
    )


@pytest.mark.parametrize("num_slots", [1, 2, 8, 64])
@pytest.mark.parametrize("eviction", POLICIES)
def test_small_tiers_hit_what_fits_and_no_more(eviction: str, num_slots: int) -> None:
    again = [[expert(0, i % num_slots)] for i in range(10 * num_slots)]
    assert misses_of_core(again, num_slots, eviction) == num_slots
    fresh = [[expert(0, i)] for i in range(3 * num_slots)]
    assert misses_of_core(fresh, num_slots, eviction) == 3 * num_slots


def test_random_repeats_itself_and_spares_nobody() -> None:
    victims = []
    for _ in range(2):
        residency = _core.Residency(8 * PAGE, "random")
        chosen: list[int] = []
        for index in range(2000):
            status, gone = residency.admit([expert(0, index)], [PAGE])
            assert status == "ok"
            chosen += gone
            residency.mark_ready(expert(0, index))
        victims.append(chosen)
    assert victims[0] == victims[1]
    # Each of the eight goes with the same chance, so a block stays eight admissions on average.
    stays = [index + 8 - victim % 2**32 for index, victim in enumerate(victims[0])]
    assert abs(sum(stays) / len(stays) - 8) < 1
    assert max(stays) > 24


def test_gdsf_lets_a_large_block_go_before_small_ones_used_as_often() -> None:
    residency = _core.Residency(64 * PAGE, "gdsf")
    small = [expert(0, index) for index in range(32)]
    large = expert(1, 0)
    for key, nbytes in [*((key, PAGE) for key in small), (large, 32 * PAGE)]:
        assert residency.admit([key], [nbytes])[0] == "ok"
        residency.mark_ready(key)
    # The large one is the newest, and LRU would let 32 small ones go.
    assert residency.admit([expert(1, 1)], [32 * PAGE]) == ("ok", [large])


@pytest.mark.parametrize("eviction", POLICIES)
def test_pinned_blocks_are_never_chosen(eviction: str) -> None:
    rng = random.Random(3)
    residency = _core.Residency(16 * PAGE, eviction)
    pinned: list[int] = []
    for index in range(400):
        key = expert(rng.randrange(3), index)
        status, victims = residency.admit([key], [PAGE])
        assert status == "ok"
        assert not set(victims) & set(pinned)
        residency.mark_ready(key)
        residency.pin(key)
        pinned.append(key)
        if len(pinned) == 15:
            residency.unpin(pinned.pop(rng.randrange(15)))


def shifting_trace(num_events: int) -> Trace:
    """Zipf popularity whose order changes for good every 2000 requests."""
    rng = random.Random(5)
    weights = [1 / (rank + 1) for rank in range(300)]
    order = list(range(300))
    trace = []
    for step in range(num_events):
        if step % 2000 == 0:
            rng.shuffle(order)
        trace.append([expert(0, order[rng.choices(range(300), weights)[0]])])
    return trace


@pytest.mark.parametrize("num_slots", [32, 100])
@pytest.mark.parametrize("trace", ["zipf", "layers", "shifting"])
def test_adaptive_beats_recency_and_frequency(trace: str, num_slots: int) -> None:
    events = shifting_trace(8000) if trace == "shifting" else TRACES[trace]
    misses = {name: misses_of_core(events, num_slots, name) for name in ("adaptive", "lru", "lfu")}
    assert misses["adaptive"] < min(misses["lru"], misses["lfu"])


def test_adaptive_keeps_what_recency_wants_where_recency_is_right() -> None:
    """Each block is used three times within a few requests and never again."""
    rng = random.Random(6)
    uses = sorted((first + rng.random() * 20, first) for first in range(3000) for _ in range(3))
    events = [[expert(0, index)] for _, index in uses]
    misses = {name: misses_of_core(events, 30, name) for name in ("adaptive", "lru")}
    assert misses["adaptive"] < 1.05 * misses["lru"]


def test_adaptive_survives_a_budget_below_one_token() -> None:
    """The same 16 experts every token, room for 12: LRU hits nothing."""
    events = [[expert(layer, i) for i in range(4)] for _ in range(100) for layer in range(4)]
    accesses = 4 * len(events)
    assert misses_of_core(events, 12, "lru") == accesses
    assert misses_of_core(events, 12, "adaptive") < 0.6 * accesses


def misses_with_hints(trace: Trace, num_slots: int, recall: float, lookahead: int) -> int:
    """As `misses_of_core`, hinting each event `lookahead` events before it comes."""
    rng = random.Random(7)
    residency, misses = _core.Residency(num_slots * PAGE, "hint-aware"), 0
    for number, event in enumerate(trace):
        residency.begin_event(event[0])
        missing = [key for key in event if residency.find(key) is None]
        for key in set(event) - set(missing):
            residency.pin(key)
        assert residency.admit(missing, [PAGE] * len(missing))[0] == "ok"
        for key in missing:
            residency.mark_ready(key)
        for key in set(event) - set(missing):
            residency.use(key)
            residency.unpin(key)
        misses += len(missing)
        for key in trace[number + lookahead] if number + lookahead < len(trace) else ():
            right = rng.random() < recall
            residency.hint(key if right else (key >> 32 << 32) + rng.randrange(64), 0.8)
    return misses


def test_hints_help_as_far_as_they_are_right() -> None:
    events, without = TRACES["layers"], misses_of_core(TRACES["layers"], 48, "adaptive")
    right, half, wrong = (misses_with_hints(events, 48, recall, 5) for recall in (1, 0.5, 0))
    assert right < half < without
    assert wrong < 1.01 * without

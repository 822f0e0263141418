"""Residency and eviction policies, without bytes: counts against plain Python, and invariants."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from blocks import PAGE, expert, room
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tiered_mem import _core
from tiered_mem.errors import BudgetError, ConfigError

# Without belady, which exists in the simulator only.
PLAIN = [n for n, _, _ in _core.eviction_policies() if "(" not in n and n != "belady"]
SPECS = [spec for name in PLAIN for spec in (name, f"per-layer({name})")]

Trace = Sequence[Sequence[int]]  # events, each of several keys


def zipf_trace(
    num_events: int, num_layers: int = 6, num_experts: int = 64, top_k: int = 4
) -> Trace:
    """Token after token through all layers, experts by a Zipf law of the layer's own order."""
    rng = random.Random(20)
    orders = [rng.sample(range(num_experts), num_experts) for _ in range(num_layers)]
    cumulated = list(itertools.accumulate(1 / (rank + 1) for rank in range(num_experts)))
    trace = []
    for step in range(num_events):
        layer = step % num_layers
        chosen: set[int] = set()
        while len(chosen) < top_k:
            rank = bisect.bisect_left(cumulated, rng.random() * cumulated[-1])
            chosen.add(expert(layer, orders[layer][rank]))
        trace.append(sorted(chosen))
    return trace


def cyclic_trace(num_events: int) -> Trace:
    """The worst for LRU: every layer's blocks in turn."""
    return [[expert(step % 6, i) for i in range(4)] for step in range(num_events)]


TRACES = {
    "zipf": zipf_trace(12000, num_layers=1, num_experts=512, top_k=1),
    "layers": zipf_trace(3000),
    "cyclic": cyclic_trace(200),
}


def misses_of_core(trace: Trace, num_slots: int, eviction: str) -> int:
    residency = _core.Residency(num_slots * PAGE, eviction)
    misses = 0
    for event in trace:
        residency.begin_event(event[0])
        missing = [key for key in event if residency.find(key) is None]
        for key in event:
            if key not in missing:
                residency.pin(key)
        status, _ = residency.admit(missing, [PAGE] * len(missing))
        assert status == "ok"
        for key in event:
            if key in missing:
                residency.pin(key)
                residency.mark_ready(key)
            else:
                residency.use(key)
            residency.unpin(key)
        misses += len(missing)
    assert len(residency) <= num_slots
    return misses


class PlainLru:
    """What the policies must do, written for clarity: an ordered dict, oldest first."""

    def __init__(self) -> None:
        self.keys: OrderedDict[int, None] = OrderedDict()

    def insert(self, key: int) -> None:
        self.keys[key] = None

    def touch(self, key: int) -> None:
        self.keys.move_to_end(key)

    def evict(self, pinned: Iterable[int], incoming: int) -> int | None:
        victim = next((key for key in self.keys if key not in pinned), None)
        if victim is not None:
            del self.keys[victim]
        return victim


class PlainFifo(PlainLru):
    def touch(self, key: int) -> None:
        pass


class PlainPerLayer:
    def __init__(self, make: Callable[[], PlainLru]) -> None:
        self.make = make
        self.layers: dict[int, PlainLru] = {}

    def insert(self, key: int) -> None:
        self.layers.setdefault(key >> 32, self.make()).insert(key)

    def touch(self, key: int) -> None:
        self.layers[key >> 32].touch(key)

    def evict(self, pinned: Iterable[int], incoming: int) -> int | None:
        def order(layer: int) -> tuple[int, int]:  # the layer that grows counts as grown
            return -len(self.layers[layer].keys) - (layer == incoming >> 32), layer

        victims = (
            self.layers[layer].evict(pinned, incoming) for layer in sorted(self.layers, key=order)
        )
        return next((victim for victim in victims if victim is not None), None)


MODELS: dict[str, Callable[[], PlainLru | PlainPerLayer]] = {
    "lru": PlainLru,
    "fifo": PlainFifo,
    "per-layer(lru)": lambda: PlainPerLayer(PlainLru),
    "per-layer(fifo)": lambda: PlainPerLayer(PlainFifo),
}


def misses_of_model(trace: Trace, num_slots: int, eviction: str) -> int:
    policy, resident, misses = MODELS[eviction](), set[int](), 0
    for event in trace:
        missing = [key for key in event if key not in resident]
        for key in missing:
            if len(resident) == num_slots:
                victim = policy.evict(event, key)
                assert victim is not None
                resident.remove(victim)
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
    expected = misses_of_model(TRACES[trace], num_slots, eviction)
    assert misses_of_core(TRACES[trace], num_slots, eviction) == expected


#: Misses among the 12000 keys of a trace, by policy and number of slots.
NUM_SLOTS = [8, 12, 16, 32, 64, 100, 192, 384]
GOLDEN = {
    ("zipf", "lru"): [9418, 8570, 7993, 6554, 5071, 4066, 2554, 972],
    ("zipf", "fifo"): [9696, 9051, 8562, 7229, 5757, 4747, 3061, 1187],
    ("layers", "lru"): [12000, 12000, 12000, 9458, 7021, 5409, 2927, 384],
    ("layers", "fifo"): [12000, 12000, 12000, 10175, 7922, 6307, 3634, 384],
    ("layers", "per-layer(lru)"): [11550, 11034, 10422, 8652, 6729, 5245, 2890, 384],
    ("layers", "per-layer(fifo)"): [11667, 11223, 10747, 9042, 7390, 6023, 3502, 384],
}


@pytest.mark.parametrize(("trace", "eviction"), GOLDEN)
def test_golden_miss_counts(trace: str, eviction: str) -> None:
    counts = [misses_of_core(TRACES[trace], n, eviction) for n in NUM_SLOTS]
    assert counts == GOLDEN[trace, eviction]


def test_lru_agrees_with_libcachesim() -> None:
    libcachesim = pytest.importorskip("libcachesim", reason="optional cross-check (GPL-3)")
    trace = [[key] for event in TRACES["zipf"] for key in event]
    cache = libcachesim.LRU(64)
    misses = 0
    for number, (key,) in enumerate(trace):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = key, 1, number
        misses += not cache.get(request)
    assert misses_of_core(trace, 64, "lru") == misses


@pytest.mark.parametrize("eviction", SPECS)
def test_guesses_leave_first_and_spare_each_other(eviction: str) -> None:
    residency = _core.Residency(8 * PAGE, eviction)
    keys = [expert(0, i) for i in range(20)]
    for key in keys[:6]:
        assert residency.admit([key], [PAGE]) == ("ok", [])
        residency.mark_ready(key)
    for key in keys[6:8]:
        assert residency.admit([key], [PAGE], guessed=True) == ("ok", [])
        residency.mark_ready(key)
    # A hinted block may be pushed out by demand alone.
    residency.protect(keys[6], True)
    assert residency.admit([keys[8]], [PAGE], guessed=True) == ("ok", [keys[7]])
    residency.mark_ready(keys[8])
    for i in (6, 8):
        residency.use(keys[i])
    # Used, they are as good as any other: the policy chooses among all.
    status, victims = residency.admit([keys[9]], [PAGE])
    assert (status, len(victims)) == ("ok", 1)
    assert victims[0] in {*keys[:7], keys[8]}
    if eviction in MODELS:
        assert victims == [keys[0]]


@pytest.mark.parametrize("eviction", SPECS)
def test_demand_takes_protected_blocks_last(eviction: str) -> None:
    residency = _core.Residency(3 * PAGE, eviction)
    for index in range(3):
        residency.admit([expert(0, index)], [PAGE])
        residency.mark_ready(expert(0, index))
    for index in (0, 1):
        residency.protect(expert(0, index), True)
    assert residency.admit([expert(0, 7)], [PAGE], guessed=True) == ("ok", [expert(0, 2)])
    assert residency.admit([expert(0, 8)], [PAGE], guessed=True) == ("busy", [])
    assert residency.admit([expert(0, 9)], [PAGE]) == ("ok", [expert(0, 0)])


@pytest.mark.parametrize("eviction", SPECS)
def test_space_passes_between_size_classes(eviction: str) -> None:
    residency = _core.Residency(16 * PAGE, eviction)
    small = [expert(0, i) for i in range(16)]
    residency.admit(small, [PAGE] * 16)
    for key in small:
        residency.mark_ready(key)
    large = [expert(1, i) for i in range(2)]
    status, victims = residency.admit(large, [5 * PAGE] * 2)
    assert status == "ok"
    assert len(victims) == 10
    for key in large:
        residency.mark_ready(key)
    # In one event too, and back again.
    status, _ = residency.admit([expert(2, 0), expert(2, 1)], [9 * PAGE, 7 * PAGE - 1])
    assert status == "ok"
    assert sorted(residency.keys()) == [expert(2, 0), expert(2, 1)]
    assert residency.nbytes_used == 16 * PAGE


def test_a_mixed_event_is_admitted_whole_or_not_at_all() -> None:
    residency = _core.Residency(10 * PAGE)
    residency.admit([expert(0, i) for i in range(4)], [PAGE] * 4)
    for index in range(4):
        residency.mark_ready(expert(0, index))
    residency.pin(expert(0, 3))
    before = sorted(residency.keys()), residency.nbytes_used, residency.num_evictions
    # Either class alone would fit into what is left; both don't, and room for one of them
    # could be made by evictions.
    wanted = [expert(1, 0), expert(1, 1), expert(2, 0)], [3 * PAGE, 3 * PAGE, 4 * PAGE]
    assert residency.admit(*wanted) == ("busy", [])
    assert (sorted(residency.keys()), residency.nbytes_used, residency.num_evictions) == before
    assert residency.admit([expert(1, 0), expert(2, 0)], [7 * PAGE, 4 * PAGE])[0] == "too_large"
    residency.unpin(expert(0, 3))
    assert residency.admit(*wanted)[0] == "ok"


def test_errors_of_use_are_named() -> None:
    residency = _core.Residency(4 * PAGE)
    key = expert(0, 0)
    residency.admit([key], [PAGE])
    for action in (
        lambda: residency.admit([key], [PAGE]),
        lambda: residency.admit([5, 5], [PAGE, PAGE]),
        lambda: residency.admit([5], [0]),
        lambda: residency.admit([5], [PAGE, PAGE]),
        lambda: residency.unpin(key),
        lambda: residency.pin(99),
        lambda: _core.Residency(PAGE, "magic"),
        lambda: _core.Residency(PAGE, "per-layer()"),
        lambda: _core.Residency(PAGE, ""),
    ):
        with pytest.raises(ConfigError):
            action()
    residency.pin(key)
    with pytest.raises(ConfigError, match="pins"):
        residency.drop(key)
    with pytest.raises(BudgetError, match="reserved"):
        residency.resize(5 * PAGE)


class ResidencyMachine(RuleBasedStateMachine):
    """Any sequence of calls, several size classes, beside a dict of what must be resident."""

    eviction = "lru"
    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.budget = 24 * PAGE
        self.residency = _core.Residency(self.budget, self.eviction, 32 * PAGE)
        self.nbytes: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.ready: set[int] = set()

    def used(self) -> int:
        return sum(room(n) for n in self.nbytes.values())

    def idle(self) -> list[int]:
        return [k for k in self.nbytes if k in self.ready and not self.pins[k]]

    @rule(
        layer=st.integers(0, 3),
        indices=st.sets(st.integers(0, 15), min_size=1, max_size=6),
        sizes=st.lists(
            st.sampled_from([1, PAGE, PAGE + 1, 3 * PAGE, 5 * PAGE]), min_size=1, max_size=2
        ),
        guessed=st.booleans(),
    )
    def admit(self, layer: int, indices: set[int], sizes: list[int], guessed: bool) -> None:
        keys = [k for i in sorted(indices) if (k := expert(layer, i)) not in self.nbytes]
        wanted = [sizes[i % len(sizes)] for i in range(len(keys))]
        before = self.snapshot()
        status, victims = self.residency.admit(keys, wanted, guessed)
        total = sum(room(n) for n in wanted)
        assert (status == "too_large") == (total > self.residency.budget)
        if status != "ok":
            assert not victims
            assert self.snapshot() == before
            if status == "busy" and not guessed:
                # Nothing pinned or in flight: then any event fits that is within the budget.
                assert len(self.idle()) < len(self.nbytes)
            return
        assert set(victims) <= set(self.idle())
        for key in victims:
            self.forget(key)
        for key, nbytes in zip(keys, wanted, strict=True):
            self.nbytes[key], self.pins[key] = nbytes, 0
        assert set(self.residency.keys()) == set(self.nbytes)

    def forget(self, key: int) -> None:
        del self.nbytes[key], self.pins[key]
        self.ready.discard(key)

    def choose(self, data: st.DataObject, keys: list[int]) -> int:
        return data.draw(st.sampled_from(sorted(keys)))

    @precondition(lambda self: self.nbytes)
    @rule(data=st.data())
    def pin_and_use(self, data: st.DataObject) -> None:
        key = self.choose(data, list(self.nbytes))
        self.residency.pin(key)
        self.residency.use(key)
        self.pins[key] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = self.choose(data, [k for k, n in self.pins.items() if n])
        self.residency.unpin(key)
        self.pins[key] -= 1
        self.finish_resize()

    @precondition(lambda self: len(self.ready) < len(self.nbytes))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        key = self.choose(data, [k for k in self.nbytes if k not in self.ready])
        self.residency.mark_ready(key)
        self.ready.add(key)
        self.finish_resize()

    @precondition(lambda self: self.nbytes)
    @rule(data=st.data(), on=st.booleans())
    def protect(self, data: st.DataObject, on: bool) -> None:
        self.residency.protect(self.choose(data, list(self.nbytes)), on)

    @precondition(lambda self: not all(self.pins.values()))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = self.choose(data, [k for k, n in self.pins.items() if not n])
        self.residency.drop(key)
        self.forget(key)

    @rule(num_pages=st.integers(0, 32))
    def resize(self, num_pages: int) -> None:
        self.budget = num_pages * PAGE
        self.finish_resize()

    def finish_resize(self) -> None:
        complete = self.residency.resize(self.budget)
        gone = set(self.nbytes) - set(self.residency.keys())
        assert gone <= set(self.idle())
        for key in gone:
            self.forget(key)
        assert complete == (self.residency.nbytes_cut <= self.budget)

    def snapshot(self) -> tuple[object, ...]:
        found = [(key, self.residency.find(key)) for key in sorted(self.nbytes)]
        return (
            found,
            sorted(self.residency.keys()),
            self.residency.nbytes_used,
            self.residency.num_evictions,
        )

    @invariant()
    def accounts_agree(self) -> None:
        assert self.residency.nbytes_used == self.used()
        assert len(self.residency) == len(self.nbytes)
        slots = []
        for key, nbytes in self.nbytes.items():
            found = self.residency.find(key)
            assert found is not None
            slot, slot_nbytes, pins, state, _ = found
            assert slot_nbytes == room(nbytes)
            assert slot % PAGE == 0
            assert (pins, state == "ready") == (self.pins[key], key in self.ready)
            slots.append((slot, slot + slot_nbytes))
        slots.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(slots)), "slots overlap"
        assert not slots or slots[-1][1] <= 32 * PAGE

    @invariant()
    def the_budget_holds(self) -> None:
        held = sum(room(n) for k, n in self.nbytes.items() if self.pins[k] or k not in self.ready)
        assert self.used() <= max(self.budget, held)


@pytest.mark.parametrize("eviction", MODELS)  # all: test_policy_contract.py
def test_any_sequence_of_calls_keeps_the_invariants(eviction: str) -> None:
    machine = type("Machine", (ResidencyMachine,), {"eviction": eviction})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True),
    )


def test_all_policies_are_listed_and_checked() -> None:
    for name, summary, source in _core.eviction_policies():
        assert name and summary and source
    for spec in SPECS:
        _core.check_eviction(spec)
    assert set(MODELS) <= set(SPECS)
    assert np.uint64(_core.Residency(0).budget) == 0


def test_sizes_share_the_tier_by_what_they_evict() -> None:
    # Whoever comes first takes all slabs; then the other size is used, and needs them.
    residency = _core.Residency(160 * PAGE)
    for index in range(40):
        residency.admit([expert(0, index)], [4 * PAGE])
        residency.mark_ready(expert(0, index))
    rng = random.Random(3)
    misses = []
    for _ in range(4000):
        key, missing = expert(1, rng.randrange(40)), 0
        if residency.find(key) is None:
            status, _ = residency.admit([key], [3 * PAGE])
            assert status == "ok"
            residency.mark_ready(key)
            missing = 1
        else:
            residency.use(key)
        misses.append(missing)
        if rng.random() < 0.02:  # the first size is still used now and then
            old = expert(0, 0)
            if residency.find(old) is not None:
                residency.use(old)
    assert sum(misses[-1000:]) == 0  # all 40 are there, in 120 of the 160 pages
    assert residency.nbytes_cut <= 160 * PAGE
    held = [index for index in range(40) if residency.find(expert(0, index)) is not None]
    assert 0 < len(held) <= 10

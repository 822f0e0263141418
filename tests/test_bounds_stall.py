"""The least stall, beside all schedules of tiny traces and beside the simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_traces import PAGE, Event, bounds_of, events, machine_of, num_slots, trace_of

from tiered_mem.bounds import bounds
from tiered_mem.simulate import Machine, Run, simulate
from tiered_mem.trace import Form, Trace


def least_end(events: Sequence[Event], num_slots: int, num_ticks: int, work: Sequence[int]) -> int:
    """The ticks in which the events can end, by trying all loads at every tick.

    A load takes `num_ticks` of the link and a slot from its start. An event works `work` ticks
    after the one before it, and ends with its blocks all there; if they don't fit, each must have
    been there since the event before it.
    """
    # Number of the running event, ticks it has worked, content, blocks the event has met (only if
    # they don't fit), block on its way and ticks it takes.
    State = tuple[int, int, frozenset[int], frozenset[int], int | None, int]

    def settle(state: State) -> State:
        number, worked, content, met, block, left = state
        while number < len(events):
            event = frozenset(events[number])
            fits = len(event) <= num_slots
            met = frozenset() if fits else met | (content & event)
            if worked < work[number] or event - (content if fits else met):
                break
            number, worked, met = number + 1, 0, frozenset()
        return number, worked, content, met, block, left

    def starts(state: State) -> Iterator[State]:
        number, worked, content, met, block, _ = state
        yield state
        if block is not None:
            return
        for wanted in {b for event in events[number:] for b in event} - content:
            victims = [frozenset()] if len(content) < num_slots else [{v} for v in content]
            for victim in victims:
                yield number, worked, content - victim, met, wanted, num_ticks

    def tick(state: State) -> State:
        number, worked, content, met, block, left = state
        left -= block is not None
        if block is not None and left == 0:
            content, block = content | {block}, None
        return settle((number, min(worked + 1, work[number]), content, met, block, left))

    states = {settle((0, 0, frozenset(), frozenset(), None, 0))}
    ticks = 0
    while all(state[0] < len(events) for state in states):
        states = {tick(started) for state in states for started in starts(state)}
        furthest = max(state[0] for state in states)
        if furthest == len(events):
            return ticks + 1
        ticks += 1
    return ticks


works = st.lists(st.integers(0, 3), min_size=7, max_size=7)


@given(events, num_slots, st.integers(1, 3), works)
def test_no_schedule_beats_the_least_stall(
    events: list[Event], num_slots: int, num_ticks: int, work: list[int]
) -> None:
    work = work[: len(events)]
    found = bounds_of(events, num_slots, work=work, machine=machine_of(num_ticks))
    optimum = least_end(events, num_slots, num_ticks, work) - sum(work)
    assert 0 <= found.stall_seconds_lower <= optimum + 1e-9
    if max(map(len, events)) <= num_slots:  # else Belady's own stall is but a bound
        assert optimum <= found.stall_seconds_demand + 1e-9


@pytest.mark.parametrize(
    ("events", "num_slots", "num_ticks", "work", "stall"),
    [
        # Everything fits: three blocks of two ticks, the last one's event and three more after.
        ([(0,), (1,), (2,), (0,), (1,), (2,)], 3, 2, [1, 1, 1, 1, 1, 1], 3),
        # With one slot nothing can be loaded ahead: every event takes its three ticks of loading.
        ([(0,), (1,)] * 4, 1, 3, [1] * 8, 16),
        # The first event leaves no room to load block 2 while it computes, so the second waits.
        ([(0, 1), (2,), (2,)], 2, 1, [3, 0, 3], 1),
        # Six reads would be hidden behind the first event, but there is room for two.
        ([(0,), (1, 2), (3, 4), (5, 6)], 3, 1, [6, 0, 0, 0], 4),
        ([(0,), (1, 2), (3, 4), (5, 6)], 7, 1, [6, 0, 0, 0], 1),
        # A scan of three blocks through two slots hides its loads if they take no longer.
        ([(0,), (1,), (2,)] * 3, 2, 1, [1] * 9, 0),
    ],
)
def test_the_least_stall_is_reached(
    events: list[Event], num_slots: int, num_ticks: int, work: list[int], stall: int
) -> None:
    found = bounds_of(events, num_slots, work=work, machine=machine_of(num_ticks))
    assert least_end(events, num_slots, num_ticks, work) - sum(work) == stall
    assert found.stall_seconds_lower == pytest.approx(stall)


def test_the_least_stall_knows_nothing_of_slots_that_are_being_filled() -> None:
    """A load takes a slot from its start, its bytes only as they come: the bound is below then."""
    scan = [(0,), (1,), (2,)] * 3
    assert least_end(scan, 2, 2, [1] * 9) - 9 == 5
    assert bounds_of(scan, 2, work=[1] * 9, machine=machine_of(2)).stall_seconds_lower == 3


def test_an_idle_link_cannot_make_up_for_a_full_hbm() -> None:
    """A long event, then ten blocks in turn, of which only four have room beside the long one's.

    Over the whole trace the link has far more time than it needs.
    """
    num_rounds = 20
    events = [(block,) for _ in range(num_rounds) for block in range(11)]
    work = [100.0, *[0.0] * 10] * num_rounds
    found = bounds_of(events, 5, work=work)
    assert found.stall_seconds_lower == pytest.approx(num_rounds * 6)


def test_latency_is_paid_once_ahead_and_by_each_event_on_demand() -> None:
    found = bounds_of([(0,), (1, 2), (0,), (3,)], 4, machine=machine_of(2, latency=10))
    assert found.stall_seconds_lower == 10 + 4 * 2
    assert found.stall_seconds_demand == 3 * 10 + 4 * 2


# --- beside the simulator, which is the runtime ---


def simulated(trace: Trace, num_slots: int, machine: Machine, **options: Any) -> Run:
    return simulate(trace, hbm=num_slots * PAGE, machine=machine, **options)


paces = st.sampled_from([0.25, 1.0, 3.0])


@settings(max_examples=60)
@given(events, works, paces, st.sampled_from([0.0, 0.5]))
def test_the_stall_on_demand_is_that_of_simulated_belady(
    events: list[Event], work: list[int], seconds_per_page: float, latency: float
) -> None:
    machine = machine_of(seconds_per_page, latency)
    trace = trace_of(events, work=work[: len(events)])
    found = bounds(trace, hbm=3 * PAGE, machine=machine)
    run = simulated(trace, 3, machine, eviction="belady")
    assert found.num_misses_forced == run.num_misses
    assert found.byte_miss_ratio_forced == pytest.approx(run.byte_miss_ratio)
    assert found.stall_seconds_demand == pytest.approx(run.stall_seconds, abs=1e-6)


layer_counts = st.integers(1, 2)


def prefetch_of(trace: Trace, foresees: bool) -> str:
    """All events of a token ahead, or none."""
    num_layers = len(set(trace.event_layer.tolist()))
    return f"oracle(1,{num_layers})" if foresees else "none"


@settings(max_examples=60)
@given(
    events, num_slots, works, paces, st.sampled_from(["lru", "fifo"]), layer_counts, st.booleans()
)
def test_no_run_beats_the_least_stall(
    events: list[Event],
    num_slots: int,
    work: list[int],
    seconds_per_page: float,
    eviction: str,
    num_layers: int,
    foresees: bool,
) -> None:
    machine = machine_of(seconds_per_page)
    trace = trace_of(events, work=work[: len(events)], num_layers=num_layers)
    prefetch = prefetch_of(trace, foresees)
    found = bounds(trace, hbm=num_slots * PAGE, machine=machine)
    run = simulated(trace, num_slots, machine, eviction=eviction, prefetch=prefetch)
    assert found.num_accesses == run.num_accesses
    assert found.stall_seconds_lower <= run.stall_seconds + 1e-6
    if not foresees:
        assert found.byte_miss_ratio_lower <= run.byte_miss_ratio + 1e-12
        assert found.num_misses_bypass <= found.num_misses_forced <= run.num_misses


@settings(max_examples=30)
@given(events, num_slots, st.integers(1, 3), works, layer_counts, st.booleans())
def test_no_run_with_dram_beats_the_least_stall(
    events: list[Event],
    num_slots: int,
    num_dram_slots: int,
    work: list[int],
    num_layers: int,
    foresees: bool,
) -> None:
    machine = machine_of()
    trace = trace_of(events, work=work[: len(events)], num_layers=num_layers)
    hbm, dram = num_slots * PAGE, num_dram_slots * PAGE
    found = bounds(trace, hbm=hbm, dram=dram, machine=machine)
    run = simulated(trace, num_slots, machine, dram=dram, prefetch=prefetch_of(trace, foresees))
    assert found.stall_seconds_lower <= run.stall_seconds + 1e-6
    num_blocks = len(trace.blocks[0])
    assert found.stall_seconds_lower >= num_blocks - sum(work)
    assert found.stall_seconds_lower <= bounds(trace, hbm=hbm, machine=machine).stall_seconds_lower


chains = st.lists(
    st.tuples(st.integers(0, 1), st.integers(1, 4)).map(
        lambda chain: tuple(range(4 * chain[0], 4 * chain[0] + chain[1]))
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60)
@given(chains, st.integers(1, 8))
def test_no_run_of_prefixes_beats_the_bounds(chains: list[Event], num_slots: int) -> None:
    machine = machine_of()
    trace = trace_of(chains, form=Form.PREFIX)
    found = bounds(trace, hbm=num_slots * PAGE, machine=machine)
    run = simulated(trace, num_slots, machine)
    assert found.num_accesses == run.num_accesses
    assert found.num_misses_bypass <= run.num_misses
    assert found.num_misses_prefix is not None and found.num_misses_prefix <= run.num_misses
    assert found.stall_seconds_lower <= run.stall_seconds + 1e-6
    assert found.stall_seconds_lower <= found.stall_seconds_demand + 1e-9
    everything = simulated(trace, 8, machine)
    assert found.num_misses_prefix == everything.num_misses

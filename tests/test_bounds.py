"""Bounds on misses, beside everything that could have been done instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_traces import PAGE, Event, bounds_of, events, machine_of, num_slots

from tiered_mem import _core
from tiered_mem.bounds import bounds
from tiered_mem.errors import BudgetError, ConfigError
from tiered_mem.trace import Form, Trace, TraceHeader

# --- misses on demand ---


def least_missed(events: Sequence[Event], sizes: Sequence[int], room: int, *, pinned: bool) -> int:
    """The fewest missed bytes, by trying all contents after each event.

    With `pinned`, an event's blocks are among them if they fit.
    """

    @cache
    def least(number: int, content: frozenset[int]) -> int:
        if number == len(events):
            return 0
        event = frozenset(events[number])
        missed = sum(sizes[block] for block in event - content)
        bound = pinned and sum(sizes[block] for block in event) <= room
        following = [
            after
            for after in subsets(event | content)
            if sum(sizes[block] for block in after) <= room and not (bound and event - after)
        ]
        return missed + min(least(number + 1, after) for after in following)

    return least(0, frozenset())


def subsets(blocks: frozenset[int]) -> Iterator[frozenset[int]]:
    for size in range(len(blocks) + 1):
        yield from map(frozenset, combinations(sorted(blocks), size))


@given(events, num_slots)
def test_belady_misses_the_least_in_both_forms(events: list[Event], num_slots: int) -> None:
    found = bounds_of(events, num_slots)
    assert found.is_exact
    assert found.num_misses_forced == least_missed(events, [1] * 4, num_slots, pinned=True)
    least = least_missed(events, [1] * 4, num_slots, pinned=False)
    assert found.num_misses_bypass == least
    assert found.byte_miss_ratio_bypass == found.byte_miss_ratio_lower
    assert found.byte_miss_ratio_lower == least / found.num_accesses


@given(events, st.integers(4, 7), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_no_policy_misses_fewer_bytes_than_the_lower_bound(
    events: list[Event], room: int, pages: list[int]
) -> None:
    found = bounds_of(events, room, sizes=[PAGE * p for p in pages])
    total = sum(pages[block] for event in events for block in event)
    least = least_missed(events, pages, room, pinned=False) / total
    assert found.byte_miss_ratio_lower <= least + 1e-12
    assert least <= found.byte_miss_ratio_bypass + 1e-12
    assert least_missed(events, pages, room, pinned=True) / total <= (
        found.byte_miss_ratio_forced + 1e-12
    )


def test_sizes_are_those_of_slots() -> None:
    """Two blocks of a page and a byte take four pages, and bytes are counted without padding."""
    events = [(0,), (1,)] * 3
    sizes = [PAGE + 1, PAGE + 1]
    assert bounds_of(events, 3, sizes=sizes).byte_miss_ratio_lower == 4 / 6
    assert bounds_of(events, 4, sizes=sizes).byte_miss_ratio_lower == 2 / 6
    assert bounds_of(events, 3, sizes=sizes).num_misses_forced == 6


def test_bytes_that_stay_may_beat_every_whole_block() -> None:
    """A block that doesn't fit as a whole beside another stays in part."""
    found = bounds_of([(0,), (1,)] * 4, 3, sizes=[2 * PAGE, 2 * PAGE])
    assert found.is_exact
    assert found.num_misses_bypass == 5
    mixed = bounds_of([(0,), (1,)] * 4, 4, sizes=[2 * PAGE, 3 * PAGE])
    assert not mixed.is_exact
    assert mixed.byte_miss_ratio_lower == (5 + 3 * 1) / 20
    # Best is to keep block 1; Belady, which knows no sizes, keeps block 0.
    assert least_missed([(0,), (1,)] * 4, [2, 3], 4, pinned=False) == 5 + 3 * 2
    assert mixed.byte_miss_ratio_bypass == (5 + 3 * 3) / 20


def test_an_event_larger_than_hbm_leaves_what_is_used_soonest() -> None:
    found = bounds_of([(0, 1, 2), (2,), (0, 1, 2)], 2)
    assert (found.num_misses_forced, found.num_misses_bypass) == (4, 4)


@given(events)
def test_more_hbm_never_hurts(events: list[Event]) -> None:
    by_slots = [bounds_of(events, n, work=[1] * len(events)) for n in range(1, 5)]
    for less, more in pairwise(by_slots):
        assert more.num_misses_bypass <= less.num_misses_bypass
    # Of an event larger than HBM less is known, and so both bounds are lower than they would be.
    for less, more in pairwise(by_slots[max(map(len, events)) - 1 :]):
        assert more.num_misses_forced <= less.num_misses_forced
        assert more.stall_seconds_lower <= less.stall_seconds_lower
    for found in by_slots:
        assert found.num_misses_bypass <= found.num_misses_forced
        assert found.stall_seconds_lower <= found.stall_seconds_demand + 1e-9
    all_blocks = {block for event in events for block in event}
    assert by_slots[-1].num_misses_forced == len(all_blocks)


def test_requests_and_prefixes_are_counted_by_access() -> None:
    """A chain longer than HBM is one event for the stall, but no event for misses."""
    chains = [(0, 1, 2), (0, 1, 2), (3, 1)]
    flat = [(block,) for chain in chains for block in chain]
    for form in (Form.PREFIX, Form.REQUESTS):
        found = bounds_of(chains, 2, form=form)
        assert found.num_accesses == 8
        assert found.num_misses_forced == least_missed(flat, [1] * 4, 2, pinned=True)
        assert found.num_misses_bypass == least_missed(flat, [1] * 4, 2, pinned=False)


def test_only_contiguous_prefixes_hit() -> None:
    """Block 1 of the third chain was seen, but stands behind block 3, which wasn't."""
    chains = [(0, 1, 2), (0, 1, 2), (3, 1), (3, 1, 0)]
    assert bounds_of(chains, 4, form=Form.PREFIX).num_misses_prefix == 3 + 0 + 2 + 0
    assert bounds_of(chains, 4).num_misses_prefix is None


# --- figures and errors ---


def zipf_trace() -> Trace:
    """200 events of 4 layers, 4 of 32 experts each, some layers' experts larger than others'."""
    random = np.random.default_rng(7)
    popularity = 1 / np.arange(1, 33)
    chosen = [
        random.choice(32, 4, replace=False, p=popularity / popularity.sum()) for _ in range(200)
    ]
    layer = np.repeat(np.arange(200) % 4, 4)
    return Trace.from_rows(
        TraceHeader(Form.EVENTS),
        index=np.concatenate(chosen),
        layer=layer,
        step=np.repeat(np.arange(200) // 4, 4),
        nbytes=np.array([8, 8, 6, 7])[layer] * PAGE - 100,
        compute_seconds=np.full(200, 4.0),
    )


def test_figures_of_a_zipf_trace() -> None:
    trace, machine = zipf_trace(), machine_of()
    found = bounds(trace, hbm=150 * PAGE, machine=machine)
    assert found.as_dict() == {
        "num_accesses": 800,
        "num_misses_forced": 358,
        "num_misses_bypass": 344,
        "byte_miss_ratio_forced": pytest.approx(0.4465485),
        "byte_miss_ratio_bypass": pytest.approx(0.4279240),
        "byte_miss_ratio_lower": pytest.approx(0.4225189),
        "is_exact": False,
        "num_misses_prefix": None,
        "stall_seconds_demand": pytest.approx(2026.2597656),
        "stall_seconds_lower": pytest.approx(1749.8752441),
    }
    with_dram = bounds(trace, hbm=150 * PAGE, dram=100 * PAGE, machine=machine)
    assert with_dram.stall_seconds_lower == pytest.approx(1022.4387207)


def test_hbm_must_hold_each_block() -> None:
    with pytest.raises(BudgetError, match="has a block that takes 8192"):
        bounds_of([(0,), (1,)], 1, sizes=[PAGE, PAGE + 1])


@pytest.mark.parametrize(
    ("offsets", "blocks", "problem"),
    [
        ([], [], "offsets"),
        ([0, 3], [0, 1], "offsets"),
        ([1, 2], [0, 1], "offsets"),
        ([0, 2, 1, 2], [0, 1], "offsets"),
        ([0, 2], [0, 2], "has no size"),
        ([0, 2], [1, 1], "twice"),
    ],
)
def test_events_that_cannot_be(offsets: list[int], blocks: list[int], problem: str) -> None:
    sizes = np.array([1, 1], np.uint64)
    with pytest.raises(ConfigError, match=problem):
        _core.Future(np.array(offsets, np.int64), np.array(blocks, np.uint32), sizes)
    future = _core.Future(np.array([0, 2]), np.array([0, 1], np.uint32), sizes)
    with pytest.raises(ConfigError, match="one time an event"):
        _core.least_seconds(
            future, capacity=1, pinned_nbytes=1, bytes_per_second=1, latency=0, work=np.zeros(2)
        )

"""The virtual clock: when transfers start and arrive, by hand, and that the rest is the runtime."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import PAGE, Blocks, Keys, expert, experts, uniform, wait_all, write_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem import _core
from tiered_mem.errors import ConfigError, EventTooLargeError, RuntimeClosedError

MIB = 1 << 20
PIECE = MIB // 8  # what a prefetch moves at a time
NUM_LAYERS, NUM_EXPERTS = 4, 8
LINKS = ("nvme_to_hbm", "dram_to_hbm", "hbm_to_dram")


def make(
    nbytes: int = MIB,
    hbm: int = 8,
    dram: int = 0,
    nvme: tuple[float, float] = (MIB, 0.0),
    link: tuple[float, float] = (2 * MIB, 0.0),
    **options: Any,
) -> _core.Tiers:
    """Tiers of so many blocks, each of which comes in 1 s from NVMe, in 0.5 s from DRAM."""
    speeds = dict(zip(LINKS, (nvme, link, link), strict=True))
    tiers = _core.Tiers(hbm=hbm * nbytes, dram=dram * nbytes, virtual_links=speeds, **options)
    sizes = uniform(NUM_LAYERS, NUM_EXPERTS, nbytes)
    tiers.add_virtual_blocks(list(sizes), list(sizes.values()))
    return tiers


def arrivals(tiers: _core.Tiers, event: _core.Event) -> list[float]:
    """The time at which each block of an event was in place, in the order of its keys."""
    came = [0.0] * len(event.slots)
    for _ in came:
        ready, failed = event.wait_any()
        assert not failed
        if not ready:
            break
        for position in ready:
            came[position] = tiers.now()
    return came


def use(tiers: _core.Tiers, keys: Keys) -> list[float]:
    event = tiers.acquire(keys)
    came = arrivals(tiers, event)
    event.release()
    return came


def moved(tiers: _core.Tiers) -> list[int]:
    return [tiers.stats()["nbytes_moved"][link] for link in LINKS]


# --- demand ---


def test_blocks_follow_one_another() -> None:
    tiers = make()
    event = tiers.acquire(experts(0, [3, 1, 2]))
    assert tiers.now() == 0
    assert arrivals(tiers, event) == [1, 2, 3]
    assert tiers.stats()["stall_ns"] == 3_000_000_000
    assert moved(tiers) == [3 * MIB, 0, 0]


def test_latency_is_paid_once_in_a_row_of_chunks() -> None:
    tiers = make(nvme=(MIB, 0.25))
    assert use(tiers, experts(0, [0, 1])) == [1.25, 2.25]
    assert use(tiers, experts(0, [2])) == [3.5]  # the link was free from 2 on


def test_chunks_of_a_block_follow_one_another() -> None:
    tiers = make(nbytes=5 * MIB // 2, nvme=(MIB, 0.5))
    assert use(tiers, experts(0, [0, 1])) == [3, 5.5]


def test_what_is_present_takes_no_time() -> None:
    tiers = make()
    use(tiers, experts(0, [0, 1]))
    assert use(tiers, experts(0, [1, 2, 0])) == [2, 3, 2]
    assert use(tiers, experts(0, [1, 2, 0])) == [3, 3, 3]
    assert tiers.stats()["stall_ns"] == 3_000_000_000


def test_computing_hides_transfers() -> None:
    tiers = make()
    event = tiers.acquire(experts(0, [0, 1, 2]))
    tiers.advance(1.5)
    assert event.wait_any() == ([0], [])
    assert tiers.now() == 1.5
    assert event.wait_any() == ([1], [])
    assert tiers.now() == 2
    tiers.advance(4)
    assert event.wait_any() == ([2], [])
    assert tiers.now() == 6
    assert tiers.stats()["stall_ns"] == 500_000_000


def test_links_carry_at_the_same_time() -> None:
    tiers = make(hbm=2, dram=2)
    use(tiers, experts(0, [0, 1]))  # until 2
    # The victims are copied out at once, and slots are filled when they have left: 2.5 and 3.
    assert use(tiers, experts(1, [0, 1])) == [3.5, 4.5]
    assert moved(tiers) == [4 * MIB, 0, 2 * MIB]
    # What comes back from DRAM waits too, for half a second, until its slot's victim has left.
    assert use(tiers, experts(0, [0])) == [5.5]
    assert tiers.stats()["num_dram_hits"] == 1
    assert moved(tiers)[1] == MIB


def test_reads_of_two_links_overlap() -> None:
    tiers = make(hbm=3, dram=3)
    use(tiers, experts(0, [0, 1, 2]))
    use(tiers, experts(1, [0, 1, 2]))
    began = tiers.now()
    # One from DRAM, one from NVMe: each waits for its slot's victim to leave, at 0.5 and 1.0.
    came = [at - began for at in use(tiers, np.concatenate([experts(0, [2]), experts(2, [7])]))]
    assert came == [pytest.approx(1.0), pytest.approx(2.0)]


# --- prefetch ---


def test_a_demand_overtakes_a_prefetch_at_the_next_piece() -> None:
    tiers = make()
    tiers.hint(experts(1, [0]), exact=True)
    tiers.advance(0.3)  # in the third piece of eight, which ends at 0.375
    assert use(tiers, experts(0, [0])) == [1.375]
    assert not tiers.resident(expert(1, 0))
    tiers.advance(0.625)  # the other five pieces
    assert tiers.resident(expert(1, 0))
    assert moved(tiers) == [2 * MIB, 0, 0]


def test_four_pieces_of_a_prefetch_are_under_way_at_a_time() -> None:
    # A piece takes 1/8 s, and arrives a second later.
    tiers = make(nvme=(MIB, 1.0))
    tiers.hint(experts(1, [0]), exact=True)
    for last, resident in ((2.625 - 1e-9, False), (2.625, True)):
        # The first arrives at 1.125; so the fifth starts then, the eighth at 1.5.
        tiers.advance(last - tiers.now())
        assert tiers.resident(expert(1, 0)) is resident
    # Of a demand, any number are.
    assert use(tiers, experts(0, [0, 1])) == [4.625, 5.625]


def test_a_right_guess_becomes_a_demand() -> None:
    tiers = make()
    tiers.hint(experts(1, [0]), exact=True)
    tiers.advance(0.3)
    event = tiers.acquire(experts(1, [0]))
    assert arrivals(tiers, event) == [1.0]  # three pieces, then all that is left
    stats = tiers.stats()
    assert stats["num_in_flight"] == stats["num_prefetched_used"] == 1
    assert stats["stall_ns"] == 700_000_000
    assert moved(tiers) == [MIB, 0, 0]


def test_a_raised_guess_goes_behind_earlier_demands() -> None:
    tiers = make()
    tiers.hint(experts(1, [0]), exact=True)
    tiers.advance(0.125)
    first = tiers.acquire(experts(0, [0]), stream=1)
    second = tiers.acquire(experts(1, [0]))
    assert arrivals(tiers, second) == [2.0]
    assert arrivals(tiers, first) == [2.0]  # since 1.125
    assert tiers.stats()["num_nvme_reads"] == 1


def test_a_cancelled_guess_leaves_its_bytes_in_the_account() -> None:
    tiers = make()
    tiers.hint(experts(1, [0]), exact=True)
    tiers.advance(0.3)
    assert use(tiers, experts(1, [5])) == [1.375]  # the guess was wrong
    tiers.advance(10)
    assert not tiers.resident(expert(1, 0))
    stats = tiers.stats()
    assert stats["nbytes_prefetch_wasted"] == 3 * PIECE
    assert moved(tiers) == [MIB + 3 * PIECE, 0, 0]


def test_a_guess_that_nobody_used_is_waste() -> None:
    tiers = make()
    tiers.hint(experts(1, [0]), exact=True)
    tiers.advance(1)
    use(tiers, experts(1, [5]))
    use(tiers, experts(0, range(7)))  # evicts it
    assert not tiers.resident(expert(1, 0))
    assert tiers.stats()["nbytes_prefetch_wasted"] == MIB


def test_waiting_for_the_slots_of_guesses_is_a_stall() -> None:
    tiers = make(hbm=16)
    tiers.hint(experts(1, [0, 1]), exact=True)
    tiers.advance(1 / 16)
    # No slot is free before the first piece of 1:0 has arrived, at 1/8.
    keys = np.concatenate([experts(0, range(8)), experts(2, range(8))])
    assert use(tiers, keys)[-1] == 16 + 1 / 8
    assert tiers.stats()["stall_ns"] == 16_062_500_000


def test_guesses_go_in_the_order_of_their_events() -> None:
    tiers = make(hbm=16)
    tiers.hint(experts(1, [0]), exact=True)
    tiers.hint(experts(2, [0]), exact=True)
    tiers.advance(1)
    assert tiers.resident(expert(1, 0))
    assert not tiers.resident(expert(2, 0))
    tiers.advance(1)
    assert tiers.resident(expert(2, 0))


# --- DRAM ---


def test_what_is_copied_out_uses_the_other_direction() -> None:
    tiers = make(hbm=4, dram=4, nvme=(MIB, 0.0), link=(MIB / 2, 0.0))
    use(tiers, experts(0, range(4)))
    event = tiers.acquire(experts(1, [0, 1]))
    # Copies out take 2 s each, one after the other; each slot is filled as soon as it is free.
    assert arrivals(tiers, event) == [4 + 2 + 1, 4 + 4 + 1]
    event.release()
    assert moved(tiers) == [6 * MIB, 0, 2 * MIB]
    assert tiers.stats()["dram_nbytes_used"] == 2 * MIB


def test_a_block_is_read_from_dram_once_it_is_there() -> None:
    tiers = make(hbm=1, dram=2, link=(MIB, 0.0))
    use(tiers, experts(0, [0]))  # until 1
    event = tiers.acquire(experts(0, [1]))  # 0 leaves until 2, 1 comes until 3
    assert arrivals(tiers, event) == [3]
    event.release()
    assert use(tiers, experts(0, [0])) == [5]  # 1 leaves until 4
    assert moved(tiers) == [2 * MIB, MIB, 2 * MIB]


# --- accounts and errors ---


def drive(tiers: _core.Tiers, seed: int, num_events: int = 200, hints: bool = True) -> Any:
    """Random events of several streams, hints and computing; the log, the counts, the clock."""
    rng = random.Random(seed)
    tiers.keep_log(True)
    compute, clock = 0.0, [tiers.now()]
    for step in range(num_events):
        stream = rng.randrange(2)
        keys = experts(step % NUM_LAYERS, rng.sample(range(NUM_EXPERTS), rng.randint(1, 3)))
        event = tiers.acquire(keys, stream)
        if hints and rng.random() < 0.7:
            following = rng.sample(range(NUM_EXPERTS), rng.randint(1, 4))
            layer = (step + rng.randint(1, 2)) % NUM_LAYERS
            tiers.hint(experts(layer, following), stream, rng.random() < 0.5)
        left = len(keys)
        while left:
            ready, failed = event.wait_any()
            assert not failed
            left -= len(ready)
            clock.append(tiers.now())
            share = rng.choice([0.0, 0.1, 1.0])
            compute += share
            tiers.advance(share)
            clock.append(tiers.now())
        event.release()
    assert clock == sorted(clock)
    happenings, keys = tiers.take_log()
    return (
        [*zip(happenings.tolist(), keys.tolist(), strict=True)],
        tiers.stats(),
        clock[-1],
        compute,
    )


@pytest.mark.parametrize("dram", [0, 6])
def test_the_same_run_twice_is_the_same(dram: int) -> None:
    first, second = (drive(make(hbm=7, dram=dram, link=(3 * MIB, 1e-4)), seed=1) for _ in range(2))
    assert first == second
    stats = first[1]
    assert stats["num_prefetched_used"] > 0 and stats["num_evictions"] > 0
    assert (stats["num_dram_hits"] > 0) == (dram > 0)


def test_impossible_links_are_refused() -> None:
    for bad in ((0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, -0.1), (1.0, float("nan"))):
        with pytest.raises(ConfigError, match="a link needs a speed above 0"):
            make(link=bad)
    with pytest.raises(ConfigError, match="a link needs a speed"):
        _core.Tiers(hbm=PAGE, dram=0, virtual_links={"nvme_to_hbm": (1.0, 0.0)})
    with pytest.raises(ConfigError, match="unknown link 'tape'"):
        _core.Tiers(hbm=PAGE, dram=0, virtual_links=dict.fromkeys((*LINKS, "tape"), (1.0, 0.0)))


def test_a_clock_goes_forward() -> None:
    tiers = make()
    for bad in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="a clock goes forward"):
            tiers.advance(bad)
    tiers.close()
    with pytest.raises(RuntimeClosedError):
        tiers.advance(1)


def test_real_tiers_have_a_real_clock(tmp_path: Path) -> None:
    tiers = _core.Tiers(hbm=PAGE, dram=0)
    assert tiers.now() <= tiers.now()
    with pytest.raises(ConfigError, match="runs on real time"):
        tiers.advance(1.0)
    with pytest.raises(ConfigError, match="for virtual links"):
        tiers.add_virtual_blocks(experts(0, [0]), [PAGE])


def test_blocks_that_lie_nowhere_have_a_size() -> None:
    tiers = make()
    with pytest.raises(ConfigError, match="empty"):
        tiers.add_virtual_blocks(experts(5, [0]), [0])
    with pytest.raises(ConfigError, match="as many sizes"):
        tiers.add_virtual_blocks(experts(5, [0, 1]), [PAGE])
    with pytest.raises(ConfigError, match="another size"):
        tiers.add_virtual_blocks(experts(0, [0]), [PAGE])


def test_waiting_for_what_is_not_under_way_is_an_error_and_no_wait() -> None:
    tiers = make(hbm=4)
    held = tiers.acquire(experts(0, [0, 1, 2]), stream=1)
    arrivals(tiers, held)
    with pytest.raises(ConfigError, match="waits for something that isn't under way"):
        tiers.acquire(experts(1, [0, 1]), stream=2)
    with pytest.raises(EventTooLargeError):
        tiers.acquire(experts(1, range(5)), stream=2)
    held.release()
    assert use(tiers, experts(1, [0, 1])) == [4, 5]


def test_a_closed_runtime_wakes_nobody_late() -> None:
    tiers = make()
    event = tiers.acquire(experts(0, [0, 1]))
    tiers.hint(experts(1, [0]), exact=True)
    tiers.advance(0.5)
    tiers.close()
    with pytest.raises(RuntimeClosedError):
        event.wait_any()


# --- the simulator is the runtime ---


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    sizes = uniform(NUM_LAYERS, NUM_EXPERTS, PAGE)
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks", sizes)


steps = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=4, unique=True),
        st.sampled_from([0.0, 0.3, 5.0]),
    ),
    min_size=1,
    max_size=40,
)
BUILT_INS = [
    name for name, _, _ in _core.eviction_policies() if "(" not in name and name != "belady"
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=steps,
    hbm=st.integers(4, 12),
    dram=st.sampled_from([0, 0, 5]),
    eviction=st.sampled_from([*BUILT_INS, "per-layer(lru)"]),
)
def test_virtual_tiers_decide_as_real_ones(
    blocks: Blocks, steps: Any, hbm: int, dram: int, eviction: str
) -> None:
    speeds = dict.fromkeys(LINKS, (float(PAGE), 0.1))
    virtual = _core.Tiers(hbm=hbm * PAGE, dram=dram * PAGE, eviction=eviction, virtual_links=speeds)
    virtual.add_virtual_blocks(blocks.keys, np.full(len(blocks.keys), PAGE, np.uint64))
    real = _core.Tiers(hbm=hbm * PAGE, dram=dram * PAGE, eviction=eviction, num_io_threads=1)
    blocks.add_to(real)
    compute = 0.0
    for tiers in (virtual, real):
        tiers.keep_log(True)
        for layer, indices, seconds in steps:
            event = tiers.acquire(experts(layer, indices))
            assert not wait_all(event)
            event.release()
            if tiers is virtual:
                tiers.advance(seconds)
                compute += seconds
    logs = [tuple(column.tolist() for column in tiers.take_log()) for tiers in (virtual, real)]
    assert logs[0] == logs[1]
    counts = [tiers.stats() for tiers in (virtual, real)]
    stall = counts[0]["stall_ns"] / 1e9
    for stats in counts:
        del stats["stall_ns"], stats["nbytes_moved"]["hbm_to_dram"]  # some may be on their way
    assert counts[0] == counts[1]
    missed = counts[0]["nbytes_moved"]
    assert missed["nvme_to_hbm"] == PAGE * counts[0]["num_nvme_reads"]
    assert missed["dram_to_hbm"] == PAGE * counts[0]["num_dram_hits"]
    assert stall >= missed["nvme_to_hbm"] / PAGE - compute - 1e-6
    assert virtual.now() == pytest.approx(stall + compute)
    real.close()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 20), hbm=st.integers(6, 20), dram=st.sampled_from([0, 6]))
def test_counts_of_any_run_add_up(seed: int, hbm: int, dram: int) -> None:
    tiers = make(nbytes=3 * PIECE, hbm=hbm, dram=dram, link=(3 * MIB, 0.01))
    log, stats, ended, compute = drive(tiers, seed, num_events=60)
    named = [_core.HAPPENINGS[happening] for happening, _ in log]
    assert named.count("hit") == stats["num_hbm_hits"]
    assert named.count("in_flight") == stats["num_in_flight"]
    assert named.count("prefetch") == stats["num_prefetched"]
    assert named.count("nvme_read") == stats["num_nvme_reads"]
    nbytes = stats["nbytes_moved"]
    whole = 3 * PIECE * (stats["num_nvme_reads"] + stats["num_dram_hits"])
    assert nbytes["nvme_to_hbm"] + nbytes["dram_to_hbm"] >= whole
    assert stats["num_prefetched_used"] <= stats["num_prefetched"]
    assert stats["stall_ns"] / 1e9 == pytest.approx(ended - compute, abs=1e-6)
    assert stats["hbm_nbytes_used"] <= hbm * 3 * PIECE

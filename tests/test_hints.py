"""Hints on the runtime: when they become transfers, and what they may never do."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from blocks import (
    Blocks,
    assert_right_bytes,
    expert,
    experts,
    memory_of,
    room,
    uniform,
    wait_all,
    write_blocks,
)

from tiered_mem import _core
from tiered_mem.errors import ConfigError, RuntimeClosedError

NUM_EXPERTS = 16
NBYTES = 3 * _core.IO_ALIGNMENT - 100
SLOT = room(NBYTES)
GUESS_SHARE = 8  # guesses hold at most this part of HBM


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    sizes = uniform(6, NUM_EXPERTS, NBYTES)
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks", sizes)


@pytest.fixture
def link_is_busy() -> float:
    """Bytes per second at which one block takes long enough to act while it is on its way."""
    return NBYTES / 0.25


def make(blocks: Blocks, num_slots: int, dram: int = 0) -> _core.Tiers:
    tiers = _core.Tiers(hbm=num_slots * SLOT, dram=dram)
    blocks.add_to(tiers)
    return tiers


def use(tiers: _core.Tiers, layer: int, indices: list[int], stream: int = 0) -> None:
    """An event from beginning to end."""
    event = tiers.acquire(experts(layer, indices), stream)
    assert event is not None
    assert not wait_all(event)
    event.release()


def resident(tiers: _core.Tiers, layer: int) -> set[int]:
    return {i for i in range(NUM_EXPERTS) if tiers.resident(expert(layer, i))}


def arrive(tiers: _core.Tiers, layer: int, indices: list[int]) -> None:
    """Wait until hinted blocks are there, without any event."""
    while not resident(tiers, layer) >= set(indices):
        time.sleep(0.001)


def learn(tiers: _core.Tiers, layer: int, num_events: int = 12) -> None:
    """Right hints of one block each, always missing, until rank 0 of the layer has proved itself.

    Needs an HBM in which the layer's blocks don't stay: 8 slots.
    """
    for step in range(num_events):
        index = step % NUM_EXPERTS
        tiers.hint(experts(layer, [index]))
        use(tiers, layer, [index])


# --- what a hint becomes ---


def test_an_unproved_hint_moves_nothing(blocks: Blocks) -> None:
    tiers = make(blocks, 16)
    tiers.hint(experts(1, [0, 1, 2]))
    use(tiers, 0, [0])
    stats = tiers.stats()
    assert stats["num_hints"] == 3
    assert stats["num_prefetched"] == 0
    assert not resident(tiers, 1)


def test_an_exact_hint_needs_no_proof(blocks: Blocks) -> None:
    tiers = make(blocks, 16)
    tiers.hint(experts(1, [3, 4]), exact=True)
    arrive(tiers, 1, [3, 4])
    keys = experts(1, [3, 4])
    event = tiers.acquire(keys)
    assert not wait_all(event)
    assert_right_bytes(memory_of(tiers), event, keys, blocks)
    event.release()
    stats = tiers.stats()
    assert stats["num_prefetched"] == stats["num_prefetched_used"] == 2
    assert stats["nbytes_prefetch_used"] == 2 * SLOT
    assert stats["nbytes_prefetch_wasted"] == 0


def test_wrong_hints_are_cancelled_when_the_event_comes(
    blocks: Blocks, link_is_busy: float
) -> None:
    tiers = make(blocks, 16)
    tiers.throttle("nvme_to_hbm", link_is_busy)
    busy = tiers.acquire(experts(0, [0]))
    tiers.hint(experts(1, [1, 2]), exact=True)
    assert tiers.stats()["num_prefetched"] == 2
    use(tiers, 1, [5, 6])
    assert not wait_all(busy)
    busy.release()
    stats = tiers.stats()
    assert resident(tiers, 1) == {5, 6}
    assert stats["nbytes_moved"]["nvme_to_hbm"] == 3 * NBYTES
    assert stats["num_prefetched_used"] == 0


def test_right_hints_become_demand(blocks: Blocks, link_is_busy: float) -> None:
    tiers = make(blocks, 16)
    memory = memory_of(tiers)
    tiers.throttle("nvme_to_hbm", link_is_busy)
    busy = tiers.acquire(experts(0, [0]))
    keys = experts(1, [1, 2])
    tiers.hint(keys, exact=True)
    event = tiers.acquire(keys)
    # A prefetch would wait until the link is idle: these overtake the block that holds it.
    assert not wait_all(event)
    assert_right_bytes(memory, event, keys, blocks)
    event.release()
    assert not wait_all(busy)
    busy.release()
    stats = tiers.stats()
    assert stats["num_in_flight"] == stats["num_prefetched_used"] == 2
    assert stats["num_nvme_reads"] == 1
    assert stats["nbytes_moved"]["nvme_to_hbm"] == 3 * NBYTES


def test_a_new_hint_replaces_the_one_before(blocks: Blocks, link_is_busy: float) -> None:
    tiers = make(blocks, 16)
    tiers.throttle("nvme_to_hbm", link_is_busy)
    busy = tiers.acquire(experts(0, [0]))
    tiers.hint(experts(1, [1, 2]), exact=True)
    tiers.hint(experts(1, [3, 4]), exact=True)
    assert not wait_all(busy)
    busy.release()
    use(tiers, 1, [3, 4])
    assert resident(tiers, 1) == {3, 4}
    assert tiers.stats()["num_prefetched_used"] == 2


def test_streams_are_told_apart(blocks: Blocks) -> None:
    tiers = make(blocks, 32)
    tiers.hint(experts(1, [1]), stream=1, exact=True)
    tiers.hint(experts(1, [2]), stream=2, exact=True)
    arrive(tiers, 1, [1, 2])
    use(tiers, 1, [2], stream=2)
    use(tiers, 1, [1], stream=1)
    assert tiers.precision()[int(expert(1, 0)) >> 32] == (2, 2, False)


def test_what_is_hinted_first_comes_first(blocks: Blocks) -> None:
    tiers = make(blocks, 64)
    tiers.throttle("nvme_to_hbm", NBYTES / 0.05)
    busy = tiers.acquire(experts(0, [0]))
    for layer in (1, 2):
        tiers.hint(experts(layer, [0, 1, 2, 3]), exact=True)
    assert not wait_all(busy)
    busy.release()
    arrive(tiers, 2, [0])
    assert resident(tiers, 1) == {0, 1, 2, 3}


# --- proving that hints pay ---


def test_a_right_predictor_is_switched_on(blocks: Blocks) -> None:
    tiers = make(blocks, 8)
    learn(tiers, 1)
    partition = expert(1, 0) >> 32
    num_hints, num_right, on = tiers.precision()[partition]
    assert num_hints == num_right == 12
    assert on
    stats = tiers.stats()
    assert 0 < stats["num_prefetched"] < 12  # the first ones had to prove it
    assert stats["num_prefetched_used"] == stats["num_prefetched"]


def test_a_predictor_that_is_never_right_moves_nothing(blocks: Blocks) -> None:
    tiers = make(blocks, 8)
    for step in range(100):
        tiers.hint(experts(1, [(step + 1) % NUM_EXPERTS, (step + 2) % NUM_EXPERTS]))
        use(tiers, 1, [step % NUM_EXPERTS])
    stats = tiers.stats()
    assert stats["num_prefetched"] == 0
    assert stats["num_hints"] == 200
    num_hints, num_right, on = tiers.precision()[expert(1, 0) >> 32]
    assert num_hints > 0 and num_right == 0 and not on


def test_a_predictor_that_goes_wrong_is_switched_off_and_comes_back(blocks: Blocks) -> None:
    tiers = make(blocks, 8)
    learn(tiers, 1)
    for step in range(200):
        tiers.hint(experts(1, [(step + 5) % NUM_EXPERTS]))
        use(tiers, 1, [step % NUM_EXPERTS])
        if step == 149:
            before = tiers.stats()["num_prefetched"]
    assert not tiers.precision()[expert(1, 0) >> 32][2]
    assert tiers.stats()["num_prefetched"] == before
    learn(tiers, 1, 100)
    assert tiers.precision()[expert(1, 0) >> 32][2]
    assert tiers.stats()["num_prefetched"] > before


def test_ranks_are_judged_apart(blocks: Blocks) -> None:
    """The first guess is always right, the second never: only the first is fetched."""
    tiers = make(blocks, 16)
    for step in range(40):
        index = step % NUM_EXPERTS
        tiers.hint(experts(1, [index, (index + 7) % NUM_EXPERTS]))
        use(tiers, 1, [index])
        use(tiers, 2, [(step + i) % NUM_EXPERTS for i in range(10)])  # pushes layer 1 out
    stats = tiers.stats()
    assert stats["num_prefetched"] > 20
    assert stats["num_prefetched_used"] == stats["num_prefetched"]


def test_layers_are_judged_apart(blocks: Blocks) -> None:
    tiers = make(blocks, 8)
    for step in range(40):
        index = step % NUM_EXPERTS
        tiers.hint(experts(1, [index]))
        use(tiers, 1, [index])
        tiers.hint(experts(2, [(index + 5) % NUM_EXPERTS]))
        use(tiers, 2, [index])
    precision = tiers.precision()
    assert precision[expert(1, 0) >> 32][2]
    assert not precision[expert(2, 0) >> 32][2]


# --- what guesses may take ---


@pytest.mark.parametrize("num_slots", [16, 32, 64])
def test_guesses_hold_only_their_share(blocks: Blocks, num_slots: int) -> None:
    tiers = make(blocks, num_slots)
    share = num_slots // GUESS_SHARE
    for layer in (1, 2, 3):
        tiers.hint(experts(layer, list(range(NUM_EXPERTS))), stream=layer, exact=True)
    assert tiers.stats()["num_prefetched"] == share
    arrive(tiers, 1, list(range(share)))
    # Used ones are guesses no longer: there is room for as many again.
    use(tiers, 1, list(range(share)), stream=1)
    tiers.hint(experts(2, list(range(NUM_EXPERTS))), stream=2, exact=True)
    assert tiers.stats()["num_prefetched"] == 2 * share


def test_a_share_below_one_block_still_lets_one_in(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    tiers.hint(experts(1, [0, 1, 2]), exact=True)
    assert tiers.stats()["num_prefetched"] == 1


def test_wrong_guesses_leave_before_anything_that_was_used(blocks: Blocks) -> None:
    tiers = make(blocks, 16)
    use(tiers, 0, list(range(14)))
    tiers.hint(experts(1, [0, 1]), exact=True)
    arrive(tiers, 1, [0, 1])
    use(tiers, 1, [7, 8])  # wrong: both are what has to make room
    assert resident(tiers, 0) == set(range(14))
    assert resident(tiers, 1) == {7, 8}
    assert tiers.stats()["nbytes_prefetch_wasted"] == 2 * SLOT


def test_hinted_blocks_are_spared_by_guesses_but_not_by_demand(blocks: Blocks) -> None:
    tiers = make(blocks, 16)
    use(tiers, 0, list(range(16)))
    tiers.hint(experts(0, list(range(14))))  # present: to stay; the newest two are free to go
    tiers.hint(experts(1, [0, 1]), exact=True)
    assert tiers.stats()["num_prefetched"] == 2
    arrive(tiers, 1, [0, 1])
    assert resident(tiers, 0) == set(range(14))

    everything = make(blocks, 16)
    use(everything, 0, list(range(16)))
    everything.hint(experts(0, list(range(16))))
    everything.hint(experts(1, [0, 1]), exact=True)
    assert everything.stats()["num_prefetched"] == 0
    use(everything, 1, [0, 1, 2, 3])
    assert resident(everything, 1) == {0, 1, 2, 3}
    assert len(resident(everything, 0)) == 12


def test_guesses_never_take_what_is_pinned(blocks: Blocks) -> None:
    tiers = make(blocks, 16)
    keys = experts(0, list(range(16)))
    event = tiers.acquire(keys)
    assert not wait_all(event)
    tiers.hint(experts(1, [0, 1]), exact=True)
    assert tiers.stats()["num_prefetched"] == 0
    assert_right_bytes(memory_of(tiers), event, keys, blocks)
    event.release()


def test_guesses_come_from_dram_too(blocks: Blocks) -> None:
    tiers = make(blocks, 16, dram=32 * SLOT)
    use(tiers, 1, list(range(8)))
    use(tiers, 0, list(range(16)))  # pushes layer 1 out, into DRAM
    before = tiers.stats()["nbytes_moved"]
    tiers.hint(experts(1, [0, 1]), exact=True)
    arrive(tiers, 1, [0, 1])
    after = tiers.stats()["nbytes_moved"]
    assert after["dram_to_hbm"] - before["dram_to_hbm"] == 2 * SLOT
    assert after["nvme_to_hbm"] == before["nvme_to_hbm"]


def test_random_hints_never_change_what_is_read(blocks: Blocks) -> None:
    tiers = make(blocks, 24, dram=16 * SLOT)
    memory = memory_of(tiers)
    rng = np.random.default_rng(0)
    for step in range(300):
        layer = step % 4
        keys = experts(layer, rng.choice(NUM_EXPERTS, 4, replace=False).tolist())
        event = tiers.acquire(keys)
        guess = rng.choice(NUM_EXPERTS, 8, replace=False).tolist()
        tiers.hint(experts((layer + 1) % 4, guess), exact=bool(step % 3))
        assert not wait_all(event)
        assert_right_bytes(memory, event, keys, blocks)
        event.release()
    stats = tiers.stats()
    assert stats["num_prefetched"] > stats["num_prefetched_used"] > 0
    assert stats["nbytes_prefetch_wasted"] > 0


# --- bad input ---


def test_bad_hints_are_refused(blocks: Blocks, tmp_path: Path) -> None:
    tiers = make(blocks, 16)
    with pytest.raises(ConfigError, match="one layer"):
        tiers.hint(np.concatenate([experts(1, [0]), experts(2, [0])]))
    with pytest.raises(ConfigError, match="unknown"):
        tiers.hint(experts(1, [NUM_EXPERTS]), exact=True)
    assert tiers.stats()["num_prefetched"] == 0
    tiers.hint(experts(1, [0, 0]), exact=True)
    assert tiers.stats()["num_prefetched"] == 1
    tiers.hint(experts(1, []))
    tiers.close()
    with pytest.raises(RuntimeClosedError):
        tiers.hint(experts(1, [0]))


# --- events in waves ---


def test_hints_are_judged_by_the_whole_event_and_not_by_its_first_wave(
    blocks: Blocks, link_is_busy: float
) -> None:
    tiers = make(blocks, 16)
    tiers.throttle("nvme_to_hbm", link_is_busy)
    tiers.hint(experts(1, [5, 6, 7]), exact=True)
    on_the_way = tiers.announce(experts(1, [0, 1, 5, 6]))  # to be acquired in two waves
    assert on_the_way == [False, False, True, True]
    assert tiers.announce(experts(1, [7])) == [False]
    tiers.throttle("nvme_to_hbm", 0)
    use(tiers, 1, [0, 1])
    use(tiers, 1, [5, 6])
    assert tiers.stats()["num_prefetched_used"] == 2
    (num_hints, num_right, _), *rest = tiers.precision().values()
    assert (num_hints, num_right) == (3, 2) and not rest


# --- guesses and DRAM ---


def test_an_unused_guess_doesnt_cost_a_block_its_place_in_dram(blocks: Blocks) -> None:
    tiers = make(blocks, 8, dram=4 * SLOT)
    for index in range(10):
        use(tiers, 0, [index])  # 0 and 1 leave for DRAM
    tiers.hint(experts(0, [0]), exact=True)
    arrive(tiers, 0, [0])  # in the place of 2, which leaves for DRAM
    use(tiers, 0, [9])  # the hint was wrong
    for index in range(4):
        use(tiers, 1, [index])  # the guess leaves HBM, then 3, 4 and 5: DRAM drops 1 and 2
    before = tiers.stats()
    use(tiers, 0, [0])
    after = tiers.stats()
    assert after["num_dram_hits"] == before["num_dram_hits"] + 1
    assert after["num_nvme_reads"] == before["num_nvme_reads"]

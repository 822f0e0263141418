"""Transfers on the runtime: order, cancellation, lifetimes, and errors of the file."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blocks import (
    CHUNK,
    PAGE,
    Blocks,
    Keys,
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
from tiered_mem.errors import ChecksumError, RuntimeClosedError, StoreError, TransferError

NBYTES = 2 * CHUNK + PAGE - 9  # three chunks


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks", uniform(2, 8, NBYTES))


def make(blocks: Blocks, hbm_slots: int, dram_slots: int = 0, num_threads: int = 4) -> _core.Tiers:
    slot = room(NBYTES)
    tiers = _core.Tiers(hbm=hbm_slots * slot, dram=dram_slots * slot, num_io_threads=num_threads)
    blocks.add_to(tiers)
    return tiers


class Steps:
    """Lets a link's chunks through one at a time.

    The link is throttled so far that a chunk would take weeks; a change of the rate lets those
    go that wait.
    """

    def __init__(self, tiers: _core.Tiers, link: str = "nvme_to_hbm") -> None:
        self.tiers, self.link = tiers, link
        self.rates = itertools.count(1)
        tiers.throttle(link, next(self.rates))

    def moved(self) -> int:
        return int(self.tiers.stats()["nbytes_moved"][self.link])

    def step(self) -> None:
        before = self.moved()
        while self.moved() == before:
            self.tiers.throttle(self.link, next(self.rates))

    def lift(self) -> None:
        self.tiers.throttle(self.link, 0)


def acquire(tiers: _core.Tiers, keys: Keys, stream: int = 0) -> _core.Event:
    event = tiers.acquire(keys, stream)
    assert event is not None
    return event


def load(tiers: _core.Tiers, keys: Keys, stream: int = 0) -> None:
    event = acquire(tiers, keys, stream)
    assert not wait_all(event)
    event.release()


def test_demand_overtakes_prefetch(blocks: Blocks) -> None:
    tiers = make(blocks, 8, num_threads=1)
    steps = Steps(tiers)
    tiers.hint(experts(0, [0]), exact=True)
    event = acquire(tiers, experts(1, [5]))
    # Of the guess one chunk may have been under way: the demand's three come next.
    while not tiers.resident(expert(1, 5)):
        steps.step()
    assert steps.moved() <= CHUNK + NBYTES + CHUNK
    assert not tiers.resident(expert(0, 0))
    assert event.wait_any() == ([0], [])
    steps.lift()
    guess = acquire(tiers, experts(0, [0]))
    assert not wait_all(guess)
    assert_right_bytes(memory_of(tiers), guess, experts(0, [0]), blocks)
    stats = tiers.stats()
    assert stats["num_prefetched"] == stats["num_prefetched_used"] == 1
    assert stats["nbytes_moved"]["nvme_to_hbm"] == 2 * NBYTES
    tiers.close()


def test_a_wrong_guess_is_cancelled_and_gives_its_slot_back(blocks: Blocks) -> None:
    tiers = make(blocks, 8, num_threads=1)
    steps = Steps(tiers)
    tiers.hint(experts(0, [0]), exact=True)
    used = tiers.stats()["hbm_nbytes_used"]
    assert used == room(NBYTES)
    event = acquire(tiers, experts(0, [1]))  # the router has spoken
    while not tiers.resident(expert(0, 1)):
        steps.step()
    assert wait_all(event) == []
    stats = tiers.stats()
    assert stats["hbm_nbytes_used"] == room(NBYTES)
    assert stats["num_prefetched_used"] == 0
    # At most the chunk that was under way was read for nothing.
    assert stats["nbytes_prefetch_wasted"] <= CHUNK
    assert stats["nbytes_moved"]["nvme_to_hbm"] <= CHUNK + NBYTES
    tiers.close()


def test_guesses_under_way_give_way_to_an_event_that_needs_their_slots(blocks: Blocks) -> None:
    tiers = make(blocks, 4, num_threads=1)
    steps = Steps(tiers)
    tiers.hint(experts(0, [0]), stream=7, exact=True)
    assert tiers.acquire(experts(1, [0, 1, 2, 3]), wait=False) is None
    steps.lift()
    load(tiers, experts(1, [0, 1, 2, 3]))
    tiers.close()


def test_a_hint_named_twice_is_one_transfer(blocks: Blocks) -> None:
    tiers = make(blocks, 16)
    tiers.hint(experts(0, [3, 3]), exact=True)
    load(tiers, experts(0, [3]))
    stats = tiers.stats()
    assert stats["hbm_nbytes_used"] == room(NBYTES)
    assert stats["num_prefetched"] == 1
    load(tiers, experts(1, range(8)))
    tiers.close()


def test_blocks_come_back_from_dram_with_their_bytes(blocks: Blocks) -> None:
    # HBM and DRAM together hold all blocks and one event that is on its way between the two:
    # after the first round the file isn't read again.
    tiers = make(blocks, 8, 8 + 4)
    memory = memory_of(tiers)
    for number in range(4):
        for first in range(0, 16, 4):
            keys = blocks.keys[first : first + 4]
            event = acquire(tiers, keys)
            assert not wait_all(event)
            assert_right_bytes(memory, event, keys, blocks)
            event.release()
        if number == 0:
            read = tiers.stats()["num_nvme_reads"]
    stats = tiers.stats()
    assert stats["num_nvme_reads"] == read == 16
    assert stats["num_dram_hits"] == 48
    tiers.close()


def test_what_leaves_hbm_does_not_push_out_of_dram_what_is_fetched(blocks: Blocks) -> None:
    tiers = make(blocks, 2, 4)
    for indices in ([0, 1], [2, 3], [4, 5], [6, 7]):  # the last two stay in HBM, 2 to 5 in DRAM
        load(tiers, experts(0, indices))
    # 2 and 3 are the oldest in DRAM, where 6 and 7 now want to go.
    load(tiers, experts(0, [2, 3]))
    assert tiers.stats()["num_dram_hits"] == 2
    tiers.close()


def test_two_sizes_share_the_tiers(tmp_path: Path) -> None:
    sizes = {
        expert(layer, i): (5 * PAGE if layer else 2 * PAGE - 1)
        for layer in (0, 1)
        for i in range(12)
    }
    blocks = write_blocks(tmp_path / "blocks", sizes)
    tiers = _core.Tiers(hbm=24 * PAGE, dram=17 * PAGE)
    blocks.add_to(tiers)
    memory = memory_of(tiers)
    rng = np.random.default_rng(3)
    for step in range(150):
        small = experts(0, rng.choice(12, 2, replace=False).tolist())
        large = experts(1, rng.choice(12, 2, replace=False).tolist())
        keys = (small, large, np.concatenate([small, large]))[step % 3]
        event = acquire(tiers, keys)
        assert not wait_all(event)
        assert_right_bytes(memory, event, keys, blocks)
        event.release()
        assert tiers.stats()["hbm_nbytes_used"] <= 24 * PAGE
        assert tiers.stats()["dram_nbytes_used"] <= 17 * PAGE
    tiers.close()


def test_resizing_under_way(blocks: Blocks) -> None:
    slot = room(NBYTES)
    tiers = _core.Tiers(hbm=4 * slot, dram=4 * slot, hbm_reserved=8 * slot, dram_reserved=8 * slot)
    blocks.add_to(tiers)
    memory = memory_of(tiers)
    held = acquire(tiers, experts(0, [0, 1, 2]))
    assert not wait_all(held)
    assert not tiers.resize_hbm(2 * slot)  # pins hold it up
    assert tiers.stats()["hbm_nbytes_used"] == 3 * slot
    assert tiers.acquire(experts(1, [0]), wait=False) is None
    assert_right_bytes(memory, held, experts(0, [0, 1, 2]), blocks)
    held.release()
    assert tiers.stats()["hbm_nbytes_used"] <= 2 * slot
    assert tiers.resize_hbm(8 * slot)
    assert tiers.max_event(NBYTES) == 8
    assert tiers.resize_dram(0)
    everything = acquire(tiers, experts(1, range(8)))
    assert not wait_all(everything)
    assert_right_bytes(memory, everything, experts(1, range(8)), blocks)
    assert tiers.stats()["dram_nbytes_used"] == 0
    tiers.close()


# --- lifetimes ---


def orders() -> Iterator[tuple[str, ...]]:
    return itertools.permutations(("tiers", "event", "memory", "close"))


@pytest.mark.parametrize("order", orders(), ids="-".join)
def test_owners_may_go_in_any_order_with_reads_under_way(
    blocks: Blocks, order: tuple[str, ...]
) -> None:
    tiers = make(blocks, 8, 4)
    owners: dict[str, object] = {
        "tiers": tiers,
        "event": acquire(tiers, experts(0, range(6))),
        "memory": memory_of(tiers),
        "close": tiers.close,
    }
    tiers.hint(experts(1, [1, 2]), exact=True)
    del tiers
    for name in order:
        if name == "close":
            owners["close"]()  # type: ignore[operator]
        del owners[name]
        gc.collect()


def test_memory_outlives_the_runtime(blocks: Blocks) -> None:
    tiers = make(blocks, 8)
    keys = experts(0, range(4))
    event = acquire(tiers, keys)
    assert not wait_all(event)
    memory = memory_of(tiers)
    tiers.close()
    assert_right_bytes(memory, event, keys, blocks)
    del event, tiers
    gc.collect()
    memory[:] = 7
    assert memory.sum(dtype=np.int64) == 7 * len(memory)


@pytest.mark.parametrize("link", ["nvme_to_hbm", "dram_to_hbm", "hbm_to_dram"])
def test_closing_during_transfers(blocks: Blocks, link: str) -> None:
    tiers = make(blocks, 4, 4)
    load(tiers, experts(0, [0, 1, 2, 3]))
    load(tiers, experts(0, [4, 5, 6, 7]))  # 0 to 3 are in DRAM now
    tiers.throttle(link, 1)
    event = acquire(tiers, experts(0, [0, 1]))
    other = acquire(tiers, experts(1, [0]))
    tiers.hint(experts(1, [5]), exact=True)
    tiers.close()
    assert tiers.closed
    with pytest.raises(RuntimeClosedError):
        while True:
            wait_all(event)
            wait_all(other)
            acquire(tiers, experts(1, [0]))
    event.release()
    other.release()


# --- errors of the file ---


@pytest.fixture
def own(tmp_path: Path) -> Blocks:
    return write_blocks(tmp_path / "own", uniform(1, 6, NBYTES), seed=5)


def test_a_flipped_bit_is_an_error_at_its_position(own: Blocks) -> None:
    tiers = make(own, 4, 2)
    own.flip_bit(expert(0, 2), at=NBYTES - 1)
    keys = experts(0, [0, 2, 3])
    event = acquire(tiers, keys)
    ((position, error),) = wait_all(event)
    assert position == 1
    assert isinstance(error, ChecksumError)
    assert str(own.path) in str(error)
    memory = memory_of(tiers)
    assert_right_bytes(memory, event, keys, own, but=(1,))
    assert not tiers.resident(expert(0, 2))

    # The caller may fill the slot itself: then it is as good as any other.
    slot = event.slots[1]
    memory[slot : slot + NBYTES] = own.bytes[expert(0, 2)]
    event.repaired(1)
    assert tiers.resident(expert(0, 2))
    event.release()
    again = acquire(tiers, keys)
    assert not wait_all(again)
    assert_right_bytes(memory, again, keys, own)
    again.release()
    stats = tiers.stats()
    assert (stats["num_failed"], stats["num_repaired"], stats["num_nvme_reads"]) == (1, 1, 3)
    tiers.close()


def test_a_failed_block_is_read_again_by_the_next_event(own: Blocks) -> None:
    tiers = make(own, 4, 2)
    key = experts(0, [1])
    own.flip_bit(expert(0, 1))
    for _ in range(2):
        event = acquire(tiers, key)
        assert len(wait_all(event)) == 1
        event.release()
    assert tiers.stats()["hbm_nbytes_used"] == 0
    own.restore(expert(0, 1))
    event = acquire(tiers, key)
    assert not wait_all(event)
    assert_right_bytes(memory_of(tiers), event, key, own)
    assert tiers.stats()["num_failed"] == 2
    tiers.close()


def test_both_events_that_wait_for_a_block_learn_of_its_error(own: Blocks) -> None:
    tiers = make(own, 4, num_threads=1)
    steps = Steps(tiers)
    own.flip_bit(expert(0, 1))
    first, second = acquire(tiers, experts(0, [1])), acquire(tiers, experts(0, [0, 1]))
    steps.lift()
    assert [position for position, _ in wait_all(first)] == [0]
    assert [position for position, _ in wait_all(second)] == [1]
    # Until both are gone, a third event waits: the block can't be joined or read again.
    assert tiers.acquire(experts(0, [1]), wait=False) is None
    first.release()
    assert tiers.acquire(experts(0, [1]), wait=False) is None
    second.release()
    own.restore(expert(0, 1))
    load(tiers, experts(0, [1]))
    tiers.close()


def test_a_truncated_file_is_an_error_at_the_positions_beyond(own: Blocks) -> None:
    tiers = make(own, 6)
    os.truncate(own.path, own.extents[expert(0, 4)].offset + CHUNK + 5)
    keys = experts(0, range(6))
    event = acquire(tiers, keys)
    failed = dict(wait_all(event))
    assert sorted(failed) == [4, 5]
    assert all(isinstance(error, TransferError) for error in failed.values())
    assert "byte" in str(failed[4])
    assert_right_bytes(memory_of(tiers), event, keys, own, but=(4, 5))
    event.release()
    assert tiers.stats()["hbm_nbytes_used"] == 4 * room(NBYTES)
    load(tiers, experts(0, range(4)))
    tiers.close()


def test_a_failed_prefetch_is_only_a_miss(own: Blocks) -> None:
    tiers = make(own, 6)
    own.flip_bit(expert(0, 0))
    tiers.hint(experts(0, [0]), exact=True)
    while tiers.stats()["num_failed"] == 0:
        pass
    assert tiers.stats()["hbm_nbytes_used"] == 0
    own.restore(expert(0, 0))
    load(tiers, experts(0, [0]))
    tiers.close()


def test_damaged_compressed_bytes_keep_their_named_error(tmp_path: Path) -> None:
    # Stored bytes of the right checksum that aren't what the codec wrote.
    path = tmp_path / "blocks"
    stored = np.arange(100, dtype=np.uint8)
    path.write_bytes(stored.tobytes() + bytes(PAGE - 100))
    table = np.array([[100, PAGE, _core.crc32c(stored)]], np.uint32)
    tiers = _core.Tiers(hbm=4 * PAGE, dram=0)
    tiers.add_blocks(experts(0, [0]), [_core.Extent(_core.File(str(path)), 1, PAGE, 0, table)])
    event = acquire(tiers, experts(0, [0]))
    ((_, error),) = wait_all(event)
    assert isinstance(error, StoreError)
    tiers.close()

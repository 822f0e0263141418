"""The core over a device that copies later: what comes after what, staging, failures."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from blocks import PAGE, Blocks, write_blocks

from tiered_mem import _core
from tiered_mem.errors import ChecksumError, ConfigError, EventTooLargeError, TransferError
from tiered_mem.keys import BlockKey, Kind

SIZES = [3 * PAGE - 100, _core.CHUNK_NBYTES + 2 * PAGE]


def aligned(nbytes: int) -> np.ndarray:
    memory = np.zeros(nbytes + PAGE, np.uint8)
    first = -memory.ctypes.data % PAGE
    return memory[first : first + nbytes]


class Mover:
    """Makes a QueueDevice's copies, in host memory, from threads of its own."""

    def __init__(self) -> None:
        self.device = _core.QueueDevice()
        self.fail_next = False
        staging = aligned(16 << 20)
        self.device.add_pinned(staging.ctypes.data, staging.nbytes, staging)
        self.threads = [
            threading.Thread(target=self.move, args=(take,))
            for take in (self.device.take_in, self.device.take_out)
        ]
        for thread in self.threads:
            thread.start()

    def move(self, take) -> None:
        while (commands := take()) is not None:
            for number, copies, _ in commands:
                if copies and self.fail_next:
                    self.device.fail(number, "the copy was lost")
                    continue
                for target, source, nbytes in copies:
                    ctypes.memmove(target, source, nbytes)
                self.device.complete(number)

    def close(self) -> None:
        self.device.close("closed")
        for thread in self.threads:
            thread.join()


@contextmanager
def tiers_on_device(
    blocks: Blocks, segments: list[int], dram: int = 0, **options: object
) -> Iterator[tuple[_core.Tiers, Mover]]:
    mover = Mover()
    tiers = _core.Tiers(hbm=sum(segments), dram=dram, device=mover.device, **options)
    try:
        blocks.add_to(tiers)
        for nbytes in segments:
            memory = aligned(nbytes)
            tiers.add_segment(memory.ctypes.data, nbytes, memory)
        yield tiers, mover
    finally:
        tiers.close()
        mover.close()


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    keys = {
        BlockKey(Kind.EXPERT, layer, index).pack(): SIZES[layer]
        for layer in range(2)
        for index in range(12)
    }
    return write_blocks(tmp_path / "blocks", keys)


def read(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


def check_event(tiers: _core.Tiers, blocks: Blocks, keys: list[int]) -> None:
    event = tiers.acquire(np.array(keys, np.uint64))
    left = len(keys)
    while left:
        ready, failed = event.wait_any()
        assert not failed
        for i in ready:
            right = blocks.bytes[keys[i]]
            np.testing.assert_array_equal(read(event.slots[i], right.nbytes), right)
        left -= len(ready)
    event.release()


def random_events(blocks: Blocks, count: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(5)
    keys = list(blocks.bytes)
    for _ in range(count):
        layer = int(rng.integers(2))
        yield [keys[12 * layer + i] for i in rng.choice(12, 3, replace=False)]


@pytest.mark.parametrize(("dram", "copy_back"), [(0, True), (6 << 20, True), (6 << 20, False)])
def test_bytes_arrive_whatever_is_evicted(blocks: Blocks, dram: int, copy_back: bool) -> None:
    options = {"num_io_threads": 3, "copy_back": copy_back}
    with tiers_on_device(blocks, [5 << 20, 4 << 20], dram, **options) as (tiers, _):
        for keys in random_events(blocks, 120):
            tiers.hint(np.array(keys[:2], np.uint64), exact=True)
            check_event(tiers, blocks, keys)
        stats = tiers.stats()
        assert stats["num_evictions"] > 0
        assert (stats["num_dram_hits"] > 0) == (dram > 0)
        moved = stats["nbytes_moved"]
        assert (moved["hbm_to_dram"] > 0) == (dram > 0 and copy_back)


def test_an_event_that_no_segment_holds_is_refused(blocks: Blocks) -> None:
    large = [key for key in blocks.bytes if blocks.bytes[key].nbytes == SIZES[1]]
    with tiers_on_device(blocks, [1 << 20, 1 << 20, 2 << 20]) as (tiers, _):
        assert tiers.max_event(SIZES[1]) == 1
        with pytest.raises(EventTooLargeError):
            tiers.acquire(np.array(large[:2], np.uint64))
        check_event(tiers, blocks, large[:1])


class Owner:
    """Of a segment: says when it is let go."""

    def __init__(self, memory: np.ndarray, gone: list[int]) -> None:
        self.memory = memory
        self.gone = gone

    def __del__(self) -> None:
        self.gone.append(self.memory.nbytes)


def test_a_smaller_budget_gives_segments_back(blocks: Blocks) -> None:
    gone: list[int] = []
    with tiers_on_device(blocks, []) as (tiers, _):
        for _ in range(2):
            memory = aligned(4 << 20)
            tiers.add_segment(memory.ctypes.data, memory.nbytes, Owner(memory, gone))
        with pytest.raises(ConfigError, match="overlaps"):
            tiers.add_segment(memory.ctypes.data + PAGE, PAGE, memory)
        tiers.resize_hbm(8 << 20)
        for keys in random_events(blocks, 40):
            check_event(tiers, blocks, keys)
        tiers.resize_hbm(4 << 20)
        assert gone == [4 << 20]
        for keys in random_events(blocks, 10):
            check_event(tiers, blocks, keys)
        assert tiers.stats()["hbm_nbytes_used"] <= 4 << 20


def test_a_lost_copy_closes_the_runtime_by_name(blocks: Blocks) -> None:
    with tiers_on_device(blocks, [8 << 20]) as (tiers, mover):
        keys = list(blocks.bytes)
        check_event(tiers, blocks, keys[:3])
        mover.fail_next = True
        event = tiers.acquire(np.array(keys[3:6], np.uint64))
        with suppress(TransferError):
            _, failed = event.wait_any()
            assert failed and all("lost" in str(error) for _, error in failed)
        with pytest.raises(TransferError, match="lost"):
            for _ in range(100):
                tiers.acquire(np.array(keys[:3], np.uint64)).release()


def test_the_watchdog_names_a_copy_that_never_ends(blocks: Blocks) -> None:
    device = _core.QueueDevice()  # nobody makes its copies
    staging = aligned(16 << 20)
    device.add_pinned(staging.ctypes.data, staging.nbytes, staging)
    tiers = _core.Tiers(hbm=8 << 20, dram=0, device=device, watchdog_seconds=0.2)
    blocks.add_to(tiers)
    memory = aligned(8 << 20)
    tiers.add_segment(memory.ctypes.data, memory.nbytes, memory)
    keys = np.array(list(blocks.bytes)[:2], np.uint64)
    _, failed = tiers.acquire(keys).wait_any()
    assert len(failed) >= 1 and "hasn't arrived" in str(failed[0][1])
    with pytest.raises(TransferError, match="hasn't arrived"):
        tiers.acquire(keys)
    tiers.close()
    device.close("closed")


def test_what_is_resident_is_pinned_without_a_use(blocks: Blocks) -> None:
    with tiers_on_device(blocks, [8 << 20]) as (tiers, _):
        keys = np.array(list(blocks.bytes)[:3], np.uint64)
        assert tiers.acquire_resident(keys) is None
        check_event(tiers, blocks, [int(key) for key in keys])
        before = tiers.stats()
        event = tiers.acquire_resident(keys)
        assert event is not None and event.wait_any() == ([0, 1, 2], [])
        event.release()
        assert tiers.stats()["num_hbm_hits"] == before["num_hbm_hits"]
        tiers.note_uses(keys[:2])
        after = tiers.stats()
        assert after["num_hbm_hits"] == before["num_hbm_hits"] + 2
        assert after["num_events"] == before["num_events"] + 1


@pytest.mark.parametrize("hbm", [5 << 20, 9 << 20])
def test_without_copies_back_dram_keeps_what_is_read(blocks: Blocks, hbm: int) -> None:
    tiers = _core.Tiers(hbm=hbm, dram=20 << 20, copy_back=False)
    blocks.add_to(tiers)
    memory = np.frombuffer(memoryview(tiers.hbm_memory()), np.uint8)
    keys = list(blocks.bytes)
    for _ in range(2):
        for key in keys:
            event = tiers.acquire(np.array([key], np.uint64))
            assert event.wait_any() == ([0], [])
            right = blocks.bytes[key]
            slot = event.slots[0]
            np.testing.assert_array_equal(memory[slot : slot + right.nbytes], right)
            event.release()
    stats = tiers.stats()
    assert stats["num_nvme_reads"] == len(keys)  # DRAM holds all of them by the second round
    assert stats["num_dram_hits"] > 0 and stats["nbytes_moved"]["hbm_to_dram"] == 0
    tiers.close()


def test_damage_found_on_the_way_through_dram_is_told_as_such(blocks: Blocks) -> None:
    damaged = next(iter(blocks.bytes))
    blocks.flip_bit(damaged)
    with tiers_on_device(blocks, [5 << 20], 8 << 20, copy_back=False) as (tiers, _):
        event = tiers.acquire(np.array([damaged], np.uint64))
        ready, failed = event.wait_any()
        assert not ready and isinstance(failed[0][1], ChecksumError)
        event.release()
        check_event(tiers, blocks, list(blocks.bytes)[1:4])

"""Events on the runtime: which bytes are in which slot, pins, refusals, DRAM, errors of use."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from blocks import (
    CHUNK,
    PAGE,
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
from tiered_mem.errors import (
    BudgetError,
    ConfigError,
    EventTooLargeError,
    RuntimeClosedError,
)

SPECS = [
    f"{wrap}{name}{')' if wrap else ''}" for name in ("lru", "fifo") for wrap in ("", "per-layer(")
]
NBYTES = 3 * PAGE - 100


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks", uniform(4, 16, NBYTES))


def make(blocks: Blocks, hbm_slots: int, dram_slots: int = 0, **options: object) -> _core.Tiers:
    slot = room(NBYTES)
    tiers = _core.Tiers(hbm=hbm_slots * slot, dram=dram_slots * slot, **options)  # type: ignore[arg-type]
    blocks.add_to(tiers)
    return tiers


@pytest.mark.parametrize("eviction", SPECS)
@pytest.mark.parametrize("dram_slots", [0, 12])
def test_every_slot_holds_its_blocks_bytes(blocks: Blocks, eviction: str, dram_slots: int) -> None:
    tiers = make(blocks, 10, dram_slots, eviction=eviction)
    memory = memory_of(tiers)
    rng = np.random.default_rng(1)
    for step in range(200):
        keys = experts(step % 4, rng.choice(16, 4, replace=False).tolist())
        event = tiers.acquire(keys)
        assert event is not None
        assert not wait_all(event)
        assert_right_bytes(memory, event, keys, blocks)
        event.release()
    stats = tiers.stats()
    assert stats["num_events"] == 200
    found = sum(stats[f"num_{n}"] for n in ("hbm_hits", "in_flight", "dram_hits", "nvme_reads"))
    assert found == 800
    assert (stats["num_dram_hits"] > 0) == (dram_slots > 0)
    tiers.close()


def test_threads_share_a_small_arena(blocks: Blocks) -> None:
    tiers = make(blocks, 6, 8)
    memory = memory_of(tiers)
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for step in range(60):
                layer = int(rng.integers(4))
                keys = experts(layer, rng.choice(16, 3, replace=False).tolist())
                event = tiers.acquire(keys, seed)
                assert event is not None
                following = experts((layer + 1) % 4, rng.choice(16, 4, replace=False).tolist())
                tiers.hint(following, seed, exact=step % 2 == 0)
                assert not wait_all(event)
                assert_right_bytes(memory, event, keys, blocks)
                event.release()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert tiers.stats()["num_events"] == 480
    tiers.close()


def test_an_event_without_room_is_refused_whole(blocks: Blocks) -> None:
    tiers = make(blocks, 6)
    held = tiers.acquire(experts(0, [0, 1, 2, 3]))
    assert held is not None
    assert not wait_all(held)
    before = tiers.stats()
    assert tiers.acquire(experts(0, [3, 4, 5, 6]), wait=False) is None
    assert tiers.stats() == before
    held.release()
    # Nothing stayed pinned: the whole tier can be used again.
    everything = tiers.acquire(experts(1, [0, 1, 2, 3, 4, 5]), wait=False)
    assert everything is not None
    assert not wait_all(everything)
    tiers.close()


def test_pinned_blocks_stay(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    memory = memory_of(tiers)
    keys = experts(0, [0, 1])
    held = tiers.acquire(keys)
    assert held is not None
    assert not wait_all(held)
    for index in range(2, 16, 2):
        event = tiers.acquire(experts(0, [index, index + 1]))
        assert event is not None
        assert not wait_all(event)
        assert not set(event.slots) & set(held.slots)
        event.release()
    assert_right_bytes(memory, held, keys, blocks)
    assert tiers.resident(expert(0, 0))
    tiers.close()


def test_a_block_in_flight_is_no_hit(blocks: Blocks, tmp_path: Path) -> None:
    slow = write_blocks(tmp_path / "slow", {expert(9, 0): CHUNK})
    tiers = _core.Tiers(hbm=CHUNK, dram=0)
    slow.add_to(tiers)
    tiers.throttle("nvme_to_hbm", 1e-3)  # a chunk that would take half a year
    key = slow.keys
    first = tiers.acquire(key)
    second = tiers.acquire(key)
    assert first is not None and second is not None
    assert not tiers.resident(expert(9, 0))
    stats = tiers.stats()
    assert (stats["num_hbm_hits"], stats["num_in_flight"], stats["num_nvme_reads"]) == (0, 1, 1)
    assert first.slots == second.slots
    tiers.close()


@pytest.mark.parametrize("present", [0, 2, 5])
def test_an_event_larger_than_the_tier_is_an_error(blocks: Blocks, present: int) -> None:
    # Never a wait: not even if a part of it lies in the tier already.
    tiers = make(blocks, 5)
    event = tiers.acquire(experts(0, list(range(present))))
    assert event is not None
    assert not wait_all(event)
    event.release()
    with pytest.raises(EventTooLargeError, match="waves"):
        tiers.acquire(experts(0, list(range(6))))
    assert tiers.max_event(NBYTES) == 5
    tiers.close()


def test_errors_of_use_are_named(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    with pytest.raises(ConfigError, match="twice"):
        tiers.acquire(experts(0, [1, 2, 1]))
    with pytest.raises(ConfigError, match="unknown"):
        tiers.acquire(experts(0, [1, 99]))
    with pytest.raises(ConfigError, match="unknown"):
        tiers.hint(experts(0, [1, 99]), exact=True)
    with pytest.raises(ConfigError, match="one layer"):
        tiers.hint(np.array([expert(0, 0), expert(1, 0)], np.uint64))
    with pytest.raises(ConfigError, match="unknown link"):
        tiers.throttle("hbm", 1)
    with pytest.raises(ConfigError, match=r"unknown eviction policy 'magic'.*lru.*fifo"):
        _core.Tiers(hbm=PAGE, dram=0, eviction="magic")
    with pytest.raises(ConfigError, match="unknown eviction policy"):
        _core.check_eviction("per-layer(magic)")
    with pytest.raises(BudgetError):
        tiers.resize_hbm(10**12)
    tiers.close()
    tiers.close()
    with pytest.raises(RuntimeClosedError):
        tiers.acquire(experts(0, [1]))
    with pytest.raises(RuntimeClosedError):
        tiers.hbm_memory()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_io_threads": 0}, "num_io_threads"),
        ({"hbm": 2**63}, "bytes"),
        ({"hbm": 2**64 - 1}, "bytes"),
        ({"dram_reserved": 2**63}, "bytes"),
    ],
)
def test_impossible_runtimes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _core.Tiers(**{"hbm": PAGE, "dram": 0, **options})  # type: ignore[arg-type]


def test_impossible_blocks_are_refused(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    key = blocks.keys[:1]
    empty = _core.Extent(_core.File(str(blocks.path)), 0, 0, 0, np.empty((0, 3), np.uint32))
    with pytest.raises(ConfigError, match="empty"):
        tiers.add_blocks(experts(5, [0]), [empty])
    with pytest.raises(ConfigError, match="empty"):
        tiers.add_blocks(experts(5, [0]), [None])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="as many"):
        tiers.add_blocks(experts(5, [0, 1]), [blocks.extents[int(key[0])]])
    with pytest.raises(ConfigError, match="bytes"):
        tiers.max_event(0)
    with pytest.raises(ConfigError, match="rate"):
        tiers.throttle("nvme_to_hbm", -1.0)
    with pytest.raises(ConfigError, match="rate"):
        tiers.throttle("nvme_to_hbm", float("nan"))
    # A block may move within the store, but not change its size.
    tiers.add_blocks(key, [blocks.extents[int(blocks.keys[1])]])
    other = write_blocks(blocks.path.with_name("other"), {int(key[0]): NBYTES + 1})
    with pytest.raises(ConfigError, match="another size"):
        other.add_to(tiers)
    tiers.close()


def test_a_released_event_is_over(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    event = tiers.acquire(experts(0, [0, 1]))
    assert event is not None
    event.release()
    event.release()
    with pytest.raises(ConfigError, match="released"):
        event.wait_any()
    with pytest.raises(ConfigError, match="released"):
        event.repaired(0)
    everything = tiers.acquire(experts(1, [0, 1, 2, 3]))
    assert everything is not None
    assert not wait_all(everything)
    with pytest.raises(IndexError):
        everything.repaired(4)
    assert tiers.stats()["hbm_nbytes_used"] == 4 * room(NBYTES)
    tiers.close()


def test_an_empty_event(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    event = tiers.acquire(np.empty(0, np.uint64))
    assert event is not None
    assert event.slots == []
    assert event.wait_any() == ([], [])
    tiers.close()


def test_a_small_event_does_not_overtake_a_waiting_large_one(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    held = tiers.acquire(experts(0, [0]), stream=1)
    assert held is not None
    admitted = threading.Event()
    large: list[_core.Event] = []

    def wait_for_room() -> None:
        event = tiers.acquire(experts(1, [0, 1, 2, 3]), stream=2)
        assert event is not None
        large.append(event)
        admitted.set()

    thread = threading.Thread(target=wait_for_room)
    thread.start()
    # Once the large event waits, a newcomer is behind it, room or not.
    while (small := tiers.acquire(experts(0, [0]), stream=3, wait=False)) is not None:
        small.release()
    # But whoever holds an event goes ahead: the large one may be waiting for it.
    more = tiers.acquire(experts(0, [1]), stream=1)
    assert more is not None
    more.release()
    held.release()
    assert admitted.wait(60)
    thread.join()
    assert not wait_all(large[0])
    large[0].release()
    small = tiers.acquire(experts(0, [0]), stream=3)
    assert small is not None
    tiers.close()


def test_a_space_can_be_removed_and_used_anew(blocks: Blocks, tmp_path: Path) -> None:
    tiers = make(blocks, 4, 6)
    other = write_blocks(tmp_path / "other", {expert(0, i, 1): NBYTES for i in range(8)}, seed=9)
    other.add_to(tiers)
    for first in range(0, 16, 4):
        for keys in (experts(0, range(first, first + 3)), experts(0, [first // 4], 1)):
            event = tiers.acquire(keys)
            assert event is not None
            assert not wait_all(event)
            event.release()
    tiers.remove_space(1)
    with pytest.raises(ConfigError, match="unknown"):
        tiers.acquire(experts(0, [0], 1))
    assert not tiers.resident(expert(0, 3, 1))
    # Its number may name another model's blocks, of another size, from now on.
    again = write_blocks(tmp_path / "again", {expert(0, i, 1): NBYTES // 2 for i in range(4)}, 7)
    again.add_to(tiers)
    for source, keys in ((again, again.keys), (blocks, experts(0, [12, 13, 14]))):
        event = tiers.acquire(keys)
        assert event is not None
        assert not wait_all(event)
        assert_right_bytes(memory_of(tiers), event, keys, source)
        event.release()
    tiers.close()

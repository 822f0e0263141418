"""The runtime below a model: events in waves, several spaces, budgets that follow the machine."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from adapter import in_threads, num_threads, wait_until

from tiered_mem import memory_watch
from tiered_mem.config import Budgets
from tiered_mem.errors import (
    BudgetError,
    ChecksumError,
    ConfigError,
    RuntimeClosedError,
    TieredMemError,
)
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.memory_watch import MemoryWatch, shrink_to_fit
from tiered_mem.runtime import Runtime
from tiered_mem.snapshot import Snapshot
from tiered_mem.space import Space
from tiered_mem.stats import Stats
from tiered_mem.store import Store

NUM_LAYERS, NUM_EXPERTS = 3, 12
NBYTES = 5000
SLOT = 8192


def content(layer: int, index: int) -> np.ndarray:
    return np.random.default_rng(100 * layer + index).integers(0, 256, NBYTES, np.uint8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = tmp_path_factory.mktemp("runtime") / "store"
    with Store.open(path, mode="w", capacity=16 << 20) as writer, writer.transaction() as txn:
        for layer in range(NUM_LAYERS):
            for index in range(NUM_EXPERTS):
                txn.put(BlockKey(Kind.EXPERT, layer, index), content(layer, index))
    with Store.open(path) as reader:
        yield reader


def read(space: Space, layer: int, indices: list[int]) -> list[int]:
    """An event whose every block has its own bytes; returns the positions as they came."""
    came = []
    with space.begin(layer, indices) as reading:
        for position, slot in reading:
            block = space.memory[slot : slot + NBYTES]
            assert np.array_equal(block, content(layer, indices[position]))
            came.append(position)
    assert sorted(came) == list(range(len(indices)))
    return came


# --- events and waves ---


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 12])
def test_an_event_larger_than_the_tier_runs_in_waves(store: Store, slots: int) -> None:
    with Runtime(slots * SLOT) as runtime:
        space = runtime.attach(store)
        for layer in range(NUM_LAYERS):
            read(space, layer, list(range(NUM_EXPERTS)))
        stats = runtime.stats()
        waves = 1 if slots == 12 else -(-NUM_EXPERTS // max(1, slots // 2))
        assert stats.num_events == NUM_LAYERS * waves
        assert stats.num_accesses == NUM_LAYERS * NUM_EXPERTS


def test_what_is_present_comes_first(store: Store) -> None:
    with Runtime(4 * SLOT) as runtime:
        space = runtime.attach(store)
        read(space, 0, [9, 11])
        assert set(read(space, 0, list(range(12)))[:2]) == {9, 11}
        assert runtime.stats().num_hbm_hits == 2


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_threads_whose_events_all_run_in_waves(store: Store, slots: int) -> None:
    with Runtime(slots * SLOT, 4 * SLOT) as runtime:
        spaces = [runtime.attach(store), runtime.attach(store)]

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                indices = rng.permutation(NUM_EXPERTS)[: rng.integers(1, NUM_EXPERTS)].tolist()
                read(spaces[seed % 2], int(rng.integers(NUM_LAYERS)), indices)

        assert in_threads([lambda seed=seed: work(seed) for seed in range(8)]) == [None] * 8
        for space in spaces:
            space.close()
        assert runtime.nbytes_used() == {"hbm": 0, "dram": 0}


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_hbm_shrinks_between_the_waves_of_an_event(store: Store, slots: int) -> None:
    with Runtime(10 * SLOT) as runtime:
        space = runtime.attach(store)
        came = []
        with space.begin(0, list(range(NUM_EXPERTS))) as reading:
            for position, slot in reading:
                assert np.array_equal(space.memory[slot : slot + NBYTES], content(0, position))
                if not came:
                    runtime.resize(hbm=slots * SLOT)
                came.append(position)
        assert sorted(came) == list(range(NUM_EXPERTS))
        assert runtime.nbytes_used()["hbm"] <= slots * SLOT


def test_hbm_shrinks_before_an_event_starts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Runtime(2 * SLOT) as runtime:
        space = runtime.attach(store)
        planned = iter([NUM_EXPERTS])  # as it was before a shrink that came in between
        tiers = space.tiers

        class Before:  # the tiers, that say they hold more
            def __getattr__(self, name: str) -> object:
                return getattr(tiers, name)

            def max_event(self, nbytes: int) -> int:
                return next(planned, tiers.max_event(nbytes))

        monkeypatch.setattr(space, "tiers", Before())
        read(space, 0, list(range(NUM_EXPERTS)))
        read(space, 0, [])


def test_a_body_that_fails_releases_its_waves(store: Store) -> None:
    with Runtime(4 * SLOT) as runtime:
        space = runtime.attach(store)
        kept = []
        for layer in range(NUM_LAYERS):
            with pytest.raises(ZeroDivisionError), space.begin(layer, list(range(8))) as reading:
                iteration = iter(reading)
                kept.append(iteration)
                next(iteration)
                raise ZeroDivisionError
        with space.begin(0, [0, 1]):  # never iterated over
            pass
        read(space, 1, [0, 1, 2, 3])  # needs every slot
        space.close()
        assert runtime.nbytes_used()["hbm"] == 0


def test_filling_takes_both_tiers(store: Store) -> None:
    with Runtime(6 * SLOT, 4 * SLOT) as runtime:
        space = runtime.attach(store)
        seen: list[tuple[int, int]] = []
        keys = [BlockKey(Kind.EXPERT, 0, index) for index in range(NUM_EXPERTS)]
        space.fill(keys, lambda done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1]
        assert len(seen) == 10 and seen[-1][0] == 10 * NBYTES
        assert runtime.nbytes_used()["hbm"] == 6 * SLOT
        space.close()
        assert runtime.nbytes_used() == {"hbm": 0, "dram": 0}


def test_filling_goes_by_slots_and_leaves_others_theirs(store: Store) -> None:
    keys = [BlockKey(Kind.EXPERT, 0, index) for index in range(NUM_EXPERTS)]
    with Runtime(8 * SLOT) as runtime:
        other, space = runtime.attach(store), runtime.attach(store)
        read(other, 0, [0, 1, 2])
        read(space, 0, [1])
        space.fill(keys)
        assert runtime.stats().num_nvme_reads == 8
        assert all(other.resident(0, index) for index in (0, 1, 2))
        assert [index for index in range(NUM_EXPERTS) if space.resident(0, index)] == [
            0,
            1,
            2,
            3,
            4,
        ]
        space.fill(keys)
        assert runtime.stats().num_nvme_reads == 8


def test_an_interrupted_filling(store: Store) -> None:
    keys = [BlockKey(Kind.EXPERT, 0, index) for index in range(NUM_EXPERTS)]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Runtime(6 * SLOT, 4 * SLOT) as runtime:
        space = runtime.attach(store)
        with pytest.raises(KeyboardInterrupt):
            space.fill(keys, interrupt)
        space.close()
        assert runtime.nbytes_used() == {"hbm": 0, "dram": 0}


def test_a_damaged_entry_says_what_mends_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ChecksumError("expert 3 of layer 1: its entry is damaged")

    monkeypatch.setattr(Snapshot, "_parse", fail)
    with (
        Runtime(4 * SLOT) as runtime,
        pytest.raises(ChecksumError, match=r"damaged; tiered-mem verify .* --repair"),
    ):
        runtime.attach(store)


def test_a_block_without_its_source(store: Store, tmp_path: Path) -> None:
    with Runtime(4 * SLOT) as runtime:
        space = runtime.attach(store)
        with pytest.raises(ConfigError, match="layer 7"):
            space.begin(7, [0])
        for unknown in (NUM_EXPERTS, -1, 1 << 16, 1 << 32, 1 << 64):
            for use in (space.begin, space.hint):
                with pytest.raises(ConfigError, match=f"block {unknown} of layer 1 is unknown"):
                    use(1, [0, unknown])
        with pytest.raises(ConfigError, match="twice"):
            space.begin(0, [1, 1])
        with pytest.raises(ChecksumError, match="expert 3 of layer 1 has no source"):
            space.mend(BlockKey(Kind.EXPERT, 1, 3), 0, ChecksumError("damaged"))


# --- the end ---


def test_a_space_closed_by_another_thread(store: Store) -> None:
    with Runtime(3 * SLOT) as runtime:
        spaces = [runtime.attach(store) for _ in range(2)]
        runtime.throttle("nvme_to_hbm", 100 * SLOT)

        def work(space: Space) -> None:
            while True:
                read(space, 0, list(range(NUM_EXPERTS)))
                space.hint(1, [0, 1, 2])

        def close() -> None:
            wait_until(lambda: runtime.stats().num_events > 5)
            spaces[0].close()
            assert not runtime.closed
            runtime.throttle("nvme_to_hbm", 0)
            read(spaces[1], 1, list(range(NUM_EXPERTS)))

        first, second, closed = in_threads([lambda: work(spaces[0])] * 2 + [close])
        assert closed is None
        assert isinstance(first, RuntimeClosedError) and isinstance(second, RuntimeClosedError)
        spaces[0].hint(0, [1])  # a prediction for nobody
        with pytest.raises(RuntimeClosedError, match="given back"):
            spaces[0].begin(0, [1])


def test_closing_during_transfers(store: Store) -> None:
    before = num_threads()
    runtime = Runtime(NUM_EXPERTS * SLOT, 4 * SLOT)
    space = runtime.attach(store)
    runtime.throttle("nvme_to_hbm", 1)  # a block takes hours
    reading = space.begin(0, list(range(NUM_EXPERTS)))
    waiting = threading.Thread(target=runtime.close)
    with pytest.raises(RuntimeClosedError), reading:
        waiting.start()
        list(reading)
    waiting.join(60)
    assert not waiting.is_alive()
    runtime.close()
    assert runtime.closed
    wait_until(lambda: num_threads() <= before)
    assert runtime.stats().num_events == 1  # what was counted stays
    for use in (
        lambda: space.begin(0, [0]),
        lambda: runtime.attach(store),
        lambda: runtime.resize(hbm=SLOT),
    ):
        with pytest.raises(RuntimeClosedError):
            use()
    space.hint(0, [0])
    space.close()


def test_models_come_and_go(store: Store) -> None:
    with Runtime(4 * SLOT) as runtime:
        spaces = [runtime.attach(store) for _ in range(256)]
        with pytest.raises(ConfigError, match="at most 256"):
            runtime.attach(store)
        spaces[100].close()
        spaces[100].close()
        again = runtime.attach(store)
        read(again, 0, [5])
        read(spaces[255], 0, [5])
        assert runtime.stats().num_nvme_reads == 2  # a block of its own for each
    with pytest.raises(RuntimeClosedError):
        again.begin(0, [5])


def test_a_runtime_stays_where_it_is() -> None:
    with Runtime(SLOT) as runtime:
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TieredMemError, match="memory and threads"):
                copied(runtime)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0,), {}),
        ((-1,), {}),
        ((SLOT, -1), {}),
        ((1 << 60,), {}),
        (("25%",), {}),
        (("lots",), {}),
        ((SLOT,), {"eviction": "belady"}),
        ((SLOT,), {"num_io_threads": 0}),
    ],
)
def test_runtimes_that_cant_be_had(arguments: Any, options: Any) -> None:
    before = num_threads()
    with pytest.raises(ConfigError):
        Runtime(*arguments, **options)
    wait_until(lambda: num_threads() <= before)


def test_where_address_space_is_short(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    room = psutil.Process().memory_info().vms + (2 << 30)  # for threads
    resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
    try:
        runtime = Runtime(4 * SLOT, 2 * SLOT)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    with runtime:
        assert len(caplog.messages) == 1 and "can't grow" in caplog.text
        space = runtime.attach(store)
        read(space, 0, list(range(NUM_EXPERTS)))
        with pytest.raises(BudgetError, match="reserved"):
            runtime.resize(hbm=5 * SLOT)
        assert runtime.budgets == Budgets(4 * SLOT, 2 * SLOT)
        with pytest.raises(BudgetError, match="reserved"):
            runtime.resize(hbm=3 * SLOT, dram=3 * SLOT)
        assert runtime.budgets == Budgets(3 * SLOT, 2 * SLOT)  # as the tiers are
        read(space, 0, list(range(NUM_EXPERTS)))


def test_links_that_dont_exist() -> None:
    with Runtime(SLOT) as runtime:
        for link, rate in (("pcie", 1), ("nvme_to_hbm", -1), ("nvme_to_hbm", float("nan"))):
            with pytest.raises(ConfigError):
                runtime.throttle(link, rate)


# --- budgets that follow the machine ---


@pytest.fixture
def followed(store: Store) -> Iterator[Runtime]:
    budgets = Budgets(64 * SLOT, 32 * SLOT, auto_hbm=True, auto_dram=True)
    with Runtime.from_budgets(budgets, eviction="lru") as runtime:
        yield runtime


def test_short_memory_shrinks_dram_before_hbm(store: Store, followed: Runtime) -> None:
    space = followed.attach(store)
    read(space, 0, list(range(NUM_EXPERTS)))  # used already: no promise any more
    promised = (64 + 32 - NUM_EXPERTS) * SLOT
    shrink_to_fit(followed, promised)
    assert followed.budgets == Budgets(64 * SLOT, 32 * SLOT, True, True)
    shrink_to_fit(followed, promised - 10 * SLOT)
    assert followed.budgets == Budgets(64 * SLOT, 22 * SLOT, True, True)
    shrink_to_fit(followed, 20 * SLOT)
    assert followed.budgets == Budgets(32 * SLOT, 0, True, True)
    for _ in range(40):
        shrink_to_fit(followed, 0)
    assert followed.budgets == Budgets(NUM_EXPERTS * SLOT, 0, True, True)
    read(space, 1, list(range(NUM_EXPERTS)))


def test_full_tiers_shrink_too(store: Store) -> None:
    budgets = Budgets(8 * SLOT, 6 * SLOT, auto_hbm=True, auto_dram=True)
    with Runtime.from_budgets(budgets, eviction="lru") as runtime:
        space = runtime.attach(store)
        for layer in range(NUM_LAYERS):
            read(space, layer, list(range(8)))
        wait_until(lambda: runtime.nbytes_used() == {"hbm": 8 * SLOT, "dram": 6 * SLOT})
        shrink_to_fit(runtime, 0)
        assert runtime.budgets == budgets
        shrink_to_fit(runtime, -2 * SLOT)
        assert runtime.nbytes_used() == {"hbm": 8 * SLOT, "dram": 4 * SLOT}
        shrink_to_fit(runtime, -7 * SLOT)
        assert runtime.nbytes_used() == {"hbm": 5 * SLOT, "dram": 0}
        read(space, 0, list(range(NUM_EXPERTS)))


def test_a_shrink_ends_and_says_so_once(
    store: Store, followed: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    space = followed.attach(store)
    for _ in range(3):
        shrink_to_fit(followed, -(1 << 40))
        assert followed.budgets == Budgets(4 * SLOT, 0, True, True)  # HBM's sixteenth
        assert len(caplog.messages) == 2
    read(space, 0, [1, 2, 3])
    with Runtime.from_budgets(Budgets(8 * SLOT, 0, auto_hbm=True), eviction="lru") as small:
        space = small.attach(store)
        shrink_to_fit(small, -(1 << 40))
        assert small.budgets.hbm == SLOT  # a block
        read(space, 0, [1, 2, 3])


def test_only_auto_budgets_shrink(store: Store) -> None:
    with Runtime.from_budgets(Budgets(8 * SLOT, 8 * SLOT, auto_dram=True), eviction="lru") as mine:
        mine.attach(store)
        shrink_to_fit(mine, 0)
        assert mine.budgets == Budgets(8 * SLOT, 0, False, True)
    with Runtime(8 * SLOT, 8 * SLOT) as mine:
        shrink_to_fit(mine, 0)
        assert mine.budgets == Budgets(8 * SLOT, 8 * SLOT)
        assert mine._watch is None


def test_the_watch_sees_memory_run_short_and_ends(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryWatch, "_EVERY_SECONDS", 0.01)
    budgets = Budgets(64 * SLOT, 32 * SLOT, auto_hbm=True, auto_dram=True)
    runtime = Runtime.from_budgets(budgets, eviction="lru")
    watch = runtime._watch
    assert watch is not None and watch.is_alive() and watch.daemon
    space = runtime.attach(store)
    memory = SimpleNamespace(total=64 << 30, available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    wait_until(lambda: runtime.budgets == Budgets(4 * SLOT, 0, True, True))
    read(space, 0, list(range(NUM_EXPERTS)))
    runtime.close()
    watch.join(60)
    assert not watch.is_alive()


@pytest.mark.parametrize("error", [BudgetError, OSError])
def test_the_watch_outlives_errors(
    store: Store, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryWatch, "_EVERY_SECONDS", 0.01)
    calls = []

    def fail_first(runtime: Runtime, headroom: int) -> None:
        calls.append(headroom)
        if len(calls) == 1:
            raise error("once")

    monkeypatch.setattr(memory_watch, "shrink_to_fit", fail_first)
    with Runtime.from_budgets(Budgets(SLOT, 0, auto_hbm=True), eviction="lru"):
        wait_until(lambda: len(calls) > 2)


def test_the_watch_doesnt_keep_a_runtime_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryWatch, "_EVERY_SECONDS", 0.01)
    runtime = Runtime.from_budgets(Budgets(SLOT, 0, auto_hbm=True), eviction="lru")
    watch, dropped = runtime._watch, weakref.ref(runtime)
    assert watch is not None
    del runtime
    wait_until(lambda: gc.collect() >= 0 and dropped() is None)
    watch.join(60)
    assert not watch.is_alive()


def test_resizing(store: Store) -> None:
    with Runtime(8 * SLOT, 4 * SLOT) as runtime:
        space = runtime.attach(store)
        read(space, 0, [0, 1, 2, 3, 4, 5, 6, 7])
        runtime.resize(hbm=2 * SLOT)
        assert runtime.nbytes_used()["hbm"] <= 2 * SLOT
        assert runtime.budgets == Budgets(2 * SLOT, 4 * SLOT)
        read(space, 0, [0, 1, 2, 3])
        runtime.resize(dram=0)
        read(space, 0, [4, 5, 6, 7])
        assert runtime.nbytes_used()["dram"] == 0
        runtime.resize(hbm="96KiB", dram=12 * SLOT)
        read(space, 1, list(range(NUM_EXPERTS)))
        assert runtime.nbytes_used()["hbm"] == NUM_EXPERTS * SLOT
        with pytest.raises(BudgetError, match=f"{SLOT} bytes"):
            runtime.resize(hbm=SLOT - 1)


# --- what was counted ---


def test_the_difference_of_two_stats(store: Store) -> None:
    with Runtime(4 * SLOT) as runtime:
        space = runtime.attach(store)
        read(space, 0, [0, 1])
        before = runtime.stats()
        read(space, 0, [0, 1, 2])
        since = runtime.stats() - before
    assert (since.num_events, since.num_hbm_hits, since.num_nvme_reads) == (1, 2, 1)
    assert since.num_accesses == 3 and since.hit_rate == pytest.approx(2 / 3)
    assert since.nbytes_missed == NBYTES and since.nbytes_moved["nvme_to_hbm"] == NBYTES
    assert since.as_dict()["hit_rate"] == since.hit_rate
    assert since.as_dict()["prefetch_precision"] is None
    assert (Stats().hit_rate, Stats().prefetch_recall) == (0.0, None)

"""Any sequence of calls on the runtime, with the bytes looked at, beside a model in Python."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import (
    PAGE,
    Blocks,
    Keys,
    expert,
    experts,
    memory_of,
    room,
    wait_all,
    write_blocks,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tiered_mem import _core
from tiered_mem.errors import ConfigError, EventTooLargeError

NUM_EXPERTS = 8
#: Two layers of one size class, one of another.
SIZES = {0: PAGE, 1: PAGE - 17, 2: 3 * PAGE - 5}
HBM, DRAM, RESERVED = 12 * PAGE, 10 * PAGE, 16 * PAGE

layers = st.integers(0, 2)
indices = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=5, unique=True)


class TiersMachine(RuleBasedStateMachine):
    """Each event has a stream of its own: an unfinished one never makes another wait unasked."""

    blocks: Blocks
    eviction = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.tiers = _core.Tiers(
            hbm=HBM,
            dram=DRAM,
            hbm_reserved=RESERVED,
            dram_reserved=RESERVED,
            eviction=self.eviction,
            num_io_threads=2,
        )
        self.blocks.add_to(self.tiers)
        self.memory = memory_of(self.tiers)
        self.budget = HBM
        self.dram_budget = DRAM
        # None for an event that wasn't admitted: what can be done next mustn't depend on timing.
        self.events: list[tuple[_core.Event | None, Keys]] = []
        self.num_asked = 0

    def pins(self) -> Counter[int]:
        return Counter(key for _, keys in self.admitted() for key in keys.tolist())

    def admitted(self) -> list[tuple[_core.Event, Keys]]:
        return [(event, keys) for event, keys in self.events if event is not None]

    def nbytes(self, keys: Keys) -> int:
        return sum(room(len(self.blocks.bytes[key])) for key in keys.tolist())

    @rule(layer=layers, chosen=indices, more=indices, mixed=st.booleans())
    def acquire(self, layer: int, chosen: list[int], more: list[int], mixed: bool) -> None:
        keys = experts(layer, chosen)
        if mixed:
            keys = np.concatenate([keys, experts((layer + 1) % 3, more)])
        pinned = self.pins()
        before = self.tiers.stats()
        if self.nbytes(keys) > self.budget:
            with pytest.raises(EventTooLargeError):
                self.tiers.acquire(keys, wait=False)
            return
        # With nothing pinned every event that the budget holds is admitted, if need be after a
        # transfer of a guess has ended: waiting for it would be for ever only by a mistake.
        event = self.tiers.acquire(keys, wait=not pinned)
        self.events.append((event, keys))
        self.num_asked += len(keys) if event else 0
        num_events = self.tiers.stats()["num_events"]
        assert num_events - before["num_events"] == (event is not None)

    @precondition(lambda self: self.events)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.events) - 1))
        event, keys = self.events[number]
        if event is None:
            return
        ready, failed = event.wait_any()
        assert not failed
        for position in ready:
            self.check_bytes(keys.tolist()[position], event.slots[position])

    @precondition(lambda self: self.events)
    @rule(data=st.data(), finish=st.booleans())
    def release(self, data: st.DataObject, finish: bool) -> None:
        number = data.draw(st.integers(0, len(self.events) - 1))
        event, keys = self.events.pop(number)
        if event is None:
            return
        if finish:
            while event.wait_any() != ([], []):
                pass
            for key, slot in zip(keys.tolist(), event.slots, strict=True):
                self.check_bytes(key, slot)
                assert self.tiers.resident(key)
        event.release()

    @rule(
        layer=layers,
        ranked=st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=6),
        exact=st.booleans(),
    )
    def hint(self, layer: int, ranked: list[int], exact: bool) -> None:
        self.tiers.hint(experts(layer, ranked), exact=exact)

    @rule(num_pages=st.integers(1, 16))
    def resize_hbm(self, num_pages: int) -> None:
        self.budget = num_pages * PAGE
        self.tiers.resize_hbm(self.budget)

    @rule(num_pages=st.integers(0, 16))
    def resize_dram(self, num_pages: int) -> None:
        self.dram_budget = num_pages * PAGE
        self.tiers.resize_dram(self.dram_budget)

    @rule(layer=layers, chosen=indices)
    def misuse(self, layer: int, chosen: list[int]) -> None:
        before = self.tiers.stats()["num_events"]
        with pytest.raises(ConfigError, match="twice"):
            self.tiers.acquire(experts(layer, [*chosen, chosen[0]]))
        with pytest.raises(ConfigError, match="unknown"):
            self.tiers.acquire(experts(layer, [*chosen, NUM_EXPERTS]))
        assert self.tiers.stats()["num_events"] == before

    def check_bytes(self, key: int, slot: int) -> None:
        data = self.blocks.bytes[key]
        assert np.array_equal(self.memory[slot : slot + len(data)], data)

    @invariant()
    def pinned_blocks_are_whole_and_apart(self) -> None:
        held: dict[int, int] = {}
        for event, keys in self.admitted():
            for key, slot in zip(keys.tolist(), event.slots, strict=True):
                assert held.setdefault(key, slot) == slot, "a pinned block has moved"
                if self.tiers.resident(key):
                    self.check_bytes(key, slot)
        spans = sorted(
            (slot, slot + room(len(self.blocks.bytes[key]))) for key, slot in held.items()
        )
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "slots overlap"

    @invariant()
    def the_accounts_add_up(self) -> None:
        pinned = self.nbytes(np.array(list(self.pins()), np.uint64))
        # Above the budget stays only what is pinned, once transfers under way have ended.
        while self.tiers.stats()["hbm_nbytes_used"] > max(self.budget, pinned):
            time.sleep(0)
        while self.tiers.stats()["dram_nbytes_used"] > self.dram_budget:
            time.sleep(0)
        stats: dict[str, Any] = self.tiers.stats()
        names = ("hbm_hits", "in_flight", "dram_hits", "nvme_reads")
        assert sum(stats[f"num_{name}"] for name in names) == self.num_asked

    def teardown(self) -> None:
        for event, _ in self.admitted():
            event.release()
        # Nothing stayed pinned: one event can have all of HBM.
        self.tiers.resize_hbm(HBM)
        event = self.tiers.acquire(experts(2, range(4)))
        assert event is not None
        assert not wait_all(event)
        event.release()
        self.tiers.remove_space(0)
        stats = self.tiers.stats()
        assert stats["hbm_nbytes_used"] == stats["dram_nbytes_used"] == 0
        self.tiers.close()


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    sizes = {expert(layer, i): SIZES[layer] for layer in SIZES for i in range(NUM_EXPERTS)}
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks", sizes)


@pytest.mark.parametrize("eviction", ["lru", "per-layer(fifo)"])
def test_any_sequence_of_calls(blocks: Blocks, eviction: str, tmp_path: Path) -> None:
    machine = type("Machine", (TiersMachine,), {"blocks": blocks, "eviction": eviction})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True),
    )

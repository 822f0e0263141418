"""Eviction policies in Python: built-ins' twins, and what may not break when one misbehaves."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from adapter import Saved, generate, in_threads, prompt
from blocks import (
    PAGE,
    Blocks,
    Keys,
    assert_right_bytes,
    expert,
    experts,
    memory_of,
    uniform,
    wait_all,
    write_blocks,
)
from python_policies import PythonFifo, PythonLru

from tiered_mem import _core
from tiered_mem.errors import ConfigError, PolicyError
from tiered_mem.policy import EvictionPolicy, resolve_eviction
from tiered_mem.runtime import Runtime
from tiered_mem.simulate import LinkSpeed, Machine, simulate
from tiered_mem.trace import Form, Trace, TraceHeader

NUM_LAYERS, NUM_EXPERTS = 3, 12


TWINS = [("lru", PythonLru), ("fifo", PythonFifo)]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    sizes = uniform(NUM_LAYERS, NUM_EXPERTS, PAGE)
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks", sizes)


def make(blocks: Blocks, eviction: str | type[EvictionPolicy], hbm: int, dram: int = 0) -> Any:
    tiers = _core.Tiers(hbm=hbm * PAGE, dram=dram * PAGE, eviction=resolve_eviction(eviction))
    blocks.add_to(tiers)
    return tiers


def use(tiers: _core.Tiers, layer: int, indices: list[int], stream: int = 0) -> None:
    event = tiers.acquire(experts(layer, indices), stream)
    assert not wait_all(event)
    event.release()


# --- twins of built-ins ---


def requests(seed: int, count: int) -> Keys:
    rng = random.Random(seed)
    skewed = (min(int(rng.paretovariate(0.7)), NUM_EXPERTS) - 1 for _ in range(count))
    return np.array([expert(rng.randrange(NUM_LAYERS), index) for index in skewed], np.uint64)


@pytest.mark.parametrize("wrap", ["", "per-layer("])
@pytest.mark.parametrize(("built_in", "twin"), TWINS)
@pytest.mark.parametrize("num_slots", [1, 2, 7, 30])
def test_a_twin_alone_misses_as_often(
    built_in: str, twin: type[EvictionPolicy], wrap: str, num_slots: int
) -> None:
    name = resolve_eviction(twin)
    end = ")" if wrap else ""
    for seed in range(3):
        keys = requests(seed, 600)
        alone = _core.count_misses(wrap + built_in + end, keys, num_slots)
        assert _core.count_misses(wrap + name + end, keys, num_slots) == alone
        sizes = 1 + keys % np.uint64(5)
        budget = 3 * num_slots + 2
        alone_by_bytes = _core.count_misses(wrap + built_in + end, keys, budget, sizes)
        assert _core.count_misses(wrap + name + end, keys, budget, sizes) == alone_by_bytes


def decisions(tiers: _core.Tiers, seed: int) -> tuple[list[int], list[int], dict[str, Any]]:
    """Random events, hints and resizes, the log of what came of them, and the counts."""
    rng = random.Random(seed)
    tiers.keep_log(True)
    for step in range(150):
        layer = step % NUM_LAYERS
        event = tiers.acquire(experts(layer, rng.sample(range(NUM_EXPERTS), 3)))
        if step % 4 == 0:
            following = experts((layer + 1) % NUM_LAYERS, rng.sample(range(NUM_EXPERTS), 4))
            tiers.hint(following, exact=step % 8 == 0)
        tiers.advance(rng.choice([0, 0.5, 4]))
        assert not wait_all(event)
        event.release()
        if step % 20 == 19:
            tiers.resize_hbm(rng.choice([6, 9, 12]) * PAGE)
            tiers.resize_dram(rng.choice([4, 8]) * PAGE)
    happenings, keys = tiers.take_log()
    return happenings.tolist(), keys.tolist(), tiers.stats()


@pytest.mark.parametrize("wrap", ["", "per-layer("])
@pytest.mark.parametrize(("built_in", "twin"), TWINS)
def test_a_twin_decides_the_same_on_tiers(
    built_in: str, twin: type[EvictionPolicy], wrap: str
) -> None:
    def run(eviction: str) -> Any:
        tiers = _core.Tiers(
            hbm=12 * PAGE,
            dram=8 * PAGE,
            eviction=wrap + eviction + (")" if wrap else ""),
            virtual_links=dict.fromkeys(
                ("nvme_to_hbm", "dram_to_hbm", "hbm_to_dram"), (2.0 * PAGE, 0.25)
            ),
        )
        sizes = uniform(NUM_LAYERS, NUM_EXPERTS, PAGE)
        tiers.add_virtual_blocks(list(sizes), list(sizes.values()))
        return decisions(tiers, seed=5)

    theirs = run(built_in)
    assert run(resolve_eviction(twin)) == theirs
    counts = theirs[2]
    assert counts["num_dram_hits"] and counts["num_prefetched"] and counts["num_evictions"]


@pytest.mark.parametrize(("built_in", "twin"), TWINS)
def test_a_class_is_a_policy_of_the_simulator(built_in: str, twin: type[EvictionPolicy]) -> None:
    rng = np.random.default_rng(3)
    rows = {"index": rng.integers(0, 12, 400), "step": np.arange(400) // 4, "nbytes": PAGE}
    trace = Trace.from_rows(TraceHeader(Form.EVENTS), **rows)
    machine = Machine(LinkSpeed(PAGE), LinkSpeed(2 * PAGE), compute=PAGE)
    for dram in (0, 4 * PAGE):
        runs = [
            simulate(trace, hbm=6 * PAGE, dram=dram, eviction=eviction, machine=machine).as_dict()
            for eviction in (built_in, twin)
        ]
        assert runs[0] | {"eviction": twin.name} == runs[1]
    flat = Trace.from_rows(TraceHeader(Form.PREFIX), **rows)
    counts = [
        simulate(flat, hbm=6 * PAGE, eviction=eviction, machine=machine).num_hits
        for eviction in (built_in, twin)
    ]
    assert counts[0] == counts[1] > 0


def test_tiers_have_their_own_objects_and_their_budgets(blocks: Blocks) -> None:
    made: list[Noting] = []

    class Noting(PythonLru):
        name = "noting"

        def __init__(self) -> None:
            super().__init__()
            self.budgets: list[int] = []
            self.layers: list[int] = []
            self.hints: list[tuple[int, float]] = []
            made.append(self)

        def set_budget(self, nbytes: int) -> None:
            self.budgets.append(nbytes)

        def begin_event(self, layer: int) -> None:
            self.layers.append(layer)

        def hint(self, key: int, probability: float) -> None:
            self.hints.append((key, probability))

    name = resolve_eviction(Noting)
    made.clear()  # the check made one, to see whether it can be made
    tiers = make(blocks, name, 4, 3)
    use(tiers, 2, [0, 1])
    tiers.hint(experts(1, [5, 6]), exact=True)
    use(tiers, 1, [5])
    tiers.resize_hbm(2 * PAGE)
    hbm, dram = [policy for policy in made if policy.budgets]
    assert hbm.budgets == [4 * PAGE, 2 * PAGE]
    assert dram.budgets == [3 * PAGE]
    assert hbm.layers == dram.layers == [2, 1]
    assert hbm.hints == [(expert(1, i), p) for p in (1.0, 0.0) for i in (5, 6)]
    assert not dram.hints
    tiers.close()


# --- misbehaving ---


class Moody(PythonLru):
    """Behaves, until `action` is set: called in `method`, it decides what happens there."""

    name = "moody"
    method: ClassVar[str] = ""
    action: ClassVar[Callable[..., Any] | None] = None

    @classmethod
    def turn(cls, method: str, action: Callable[..., Any]) -> None:
        cls.method, cls.action = method, staticmethod(action)

    def _act(self, method: str, *arguments: Any) -> Any:
        if Moody.action is not None and Moody.method == method:
            return Moody.action(self, *arguments)
        return getattr(super(), method)(*arguments)

    def insert(self, key: int, nbytes: int) -> None:
        self._act("insert", key, nbytes)

    def touch(self, key: int) -> None:
        self._act("touch", key)

    def erase(self, key: int) -> None:
        self._act("erase", key)

    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        return self._act("evict", evictable, incoming)

    def hint(self, key: int, probability: float) -> None:
        self._act("hint", key, probability)

    def begin_event(self, layer: int) -> None:
        self._act("begin_event", layer)

    def set_budget(self, nbytes: int) -> None:
        self._act("set_budget", nbytes)


@pytest.fixture(autouse=True)
def behaving() -> Any:
    Moody.method, Moody.action = "", None
    yield
    Moody.method, Moody.action = "", None


def fail(*_: Any) -> None:
    raise ValueError("in a bad mood")


def fail_after(method: str) -> Callable[..., None]:
    """An action that does its work first: the ranking stays right."""

    def act(self: Moody, *arguments: Any) -> None:
        getattr(PythonLru, method)(self, *arguments)
        fail()

    return act


def assert_all_is_well(tiers: _core.Tiers, blocks: Blocks, num_slots: int) -> None:
    """Nothing is pinned, and every slot can be filled with the right bytes, again and again."""
    memory = memory_of(tiers)
    for layer in [*range(NUM_LAYERS), 0]:
        keys = experts(layer, range(num_slots))
        event = tiers.acquire(keys)  # for ever, if something stayed pinned
        assert not wait_all(event)
        assert_right_bytes(memory, event, keys, blocks)
        event.release()
    stats = tiers.stats()
    assert stats["hbm_nbytes_used"] == num_slots * PAGE
    assert stats["num_failed"] == 0


@pytest.mark.parametrize("dram", [0, 3])
@pytest.mark.parametrize(
    "method", ["insert", "touch", "erase", "evict", "hint", "begin_event", "set_budget"]
)
def test_what_a_policy_raises_is_the_events_error(blocks: Blocks, method: str, dram: int) -> None:
    tiers = make(blocks, Moody, 4, dram)
    use(tiers, 0, [0, 1, 2, 3])
    Moody.turn(method, fail if method == "evict" else fail_after(method))
    with pytest.raises(
        PolicyError,
        match=rf"^eviction policy 'moody': {method}\(\) raised ValueError: in a bad mood$",
    ):
        if method == "erase":
            # Only what leaves otherwise than by `evict` is erased: here as slabs are cut off.
            tiers.resize_hbm(2 * PAGE)
            tiers.resize_hbm(4 * PAGE)
        if method == "hint":
            tiers.hint(experts(1, [1]), exact=True)
        if method == "set_budget":
            tiers.resize_hbm(4 * PAGE)
        use(tiers, 0, [2, 3])  # here
        use(tiers, 1, [0, 1])  # not
    held = tiers.acquire(experts(0, [3]), stream=1) if method == "evict" else None
    Moody.action = None
    if held is not None:
        assert held.wait_any() == ([0], [])  # what is resident needs no victim
        held.release()
    assert_all_is_well(tiers, blocks, 4)
    assert tiers.stats()["num_events"] >= 5
    tiers.close()


def pinned(self: Moody, evictable: Callable[[int], bool], incoming: int | None) -> int:
    return next(key for key in self.order if not evictable(key))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda *_: None, "returned no key though there are blocks that may be evicted"),
        (lambda *_: 7, "returned key 7, which isn't resident"),
        (lambda *_: True, "returned key 1, which isn't resident"),
        (lambda self, *_: expert(2, 11), "which isn't resident"),
        (lambda self, evictable, incoming: incoming, "which may not be evicted now|isn't resident"),
        (pinned, "which may not be evicted now: it is pinned or on its way"),
        (lambda *_: -1, "OverflowError"),
        (lambda *_: 2**64, "OverflowError"),
        (lambda *_: 2**64 - 1, "isn't resident"),
        (lambda *_: "all", "TypeError"),
        (lambda *_: 3.0, "TypeError"),
        (lambda self, evictable, incoming: evictable("all"), "TypeError"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(
    blocks: Blocks, answer: Callable[..., Any], says: str
) -> None:
    tiers = make(blocks, Moody, 4)
    use(tiers, 0, [0, 1, 2, 3])
    held = tiers.acquire(experts(0, [1]), stream=1)
    assert held.wait_any() == ([0], [])
    before = tiers.stats()
    Moody.turn("evict", answer)
    for _ in range(2):
        with pytest.raises(PolicyError, match=rf"^eviction policy 'moody': evict\(\).*({says})"):
            tiers.acquire(experts(1, [0, 1]))
    assert {key: tiers.stats()[key] for key in before} == before
    use(tiers, 0, [0, 2])  # what is resident goes on
    Moody.action = None
    held.release()
    assert_all_is_well(tiers, blocks, 4)
    tiers.close()


def test_a_block_on_its_way_may_not_be_returned(blocks: Blocks) -> None:
    tiers = make(blocks, Moody, 4)
    tiers.throttle("nvme_to_hbm", 1.0)
    loading = tiers.acquire(experts(0, [0]), stream=1)
    tiers.throttle("nvme_to_hbm", 0)
    use(tiers, 0, [1, 2, 3])
    tiers.throttle("nvme_to_hbm", 1.0)
    Moody.turn("evict", lambda self, *_: expert(0, 0))
    with pytest.raises(PolicyError, match="which may not be evicted now"):
        tiers.acquire(experts(1, [0]))
    Moody.action = None
    tiers.throttle("nvme_to_hbm", 0)
    assert not wait_all(loading)
    loading.release()
    assert_all_is_well(tiers, blocks, 4)
    tiers.close()


def test_the_same_key_twice_is_refused(blocks: Blocks) -> None:
    tiers = make(blocks, Moody, 4)
    use(tiers, 0, [0, 1, 2, 3])

    def twice(self: Moody, *_: Any) -> int:
        self.order.pop(expert(0, 1), None)
        return expert(0, 1)

    Moody.turn("evict", twice)
    with pytest.raises(PolicyError, match=f"returned key {expert(0, 1)}, which isn't resident"):
        tiers.acquire(experts(1, [0, 1]))
    assert [tiers.resident(expert(0, index)) for index in range(4)] == [True] * 4
    Moody.action = None
    assert_all_is_well(tiers, blocks, 4)


def test_a_policy_that_cannot_be_made_is_named(blocks: Blocks) -> None:
    class Stillborn(PythonLru):
        name = "stillborn"

        def __init__(self) -> None:
            raise OSError("no memory of anything")

    class Abstract(EvictionPolicy):
        name = "abstract"

    for policy, says in ((Stillborn, "no memory of anything"), (Abstract, "abstract")):
        with pytest.raises(PolicyError, match=f"'{policy.name}' can't be made: .*{says}"):
            Runtime(4 * PAGE, eviction=policy)


def test_a_layers_policy_that_cannot_be_made_leaves_nothing_behind(blocks: Blocks) -> None:
    class Tired(PythonLru):
        name = "tired"
        num_left = 3

        def __init__(self) -> None:
            super().__init__()
            Tired.num_left -= 1
            if Tired.num_left < 0:
                fail()

    resolve_eviction(Tired)
    tiers = make(blocks, "per-layer(tired)", 4)
    Tired.num_left = 1
    use(tiers, 0, [0, 1, 2])
    for _ in range(2):
        with pytest.raises(PolicyError, match="'tired' can't be made: ValueError"):
            tiers.acquire(experts(1, [0, 1]))
        use(tiers, 0, [1, 2, 3, 4])
    Tired.num_left = 9
    assert_all_is_well(tiers, blocks, 4)


def test_names_that_cannot_be(blocks: Blocks) -> None:
    for name, says in (("lru", "is a built-in"), ("a b", "can't name"), ("x(1)", "can't name")):
        with pytest.raises(ConfigError, match=says):
            resolve_eviction(type("Named", (PythonLru,), {"name": name}))
    assert resolve_eviction(type("Nameless", (PythonLru,), {"name": ""})) == "Nameless"
    with pytest.raises(ConfigError, match="neither a policy's name nor a class"):
        resolve_eviction(PythonLru())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="neither a policy's name nor a class"):
        resolve_eviction(dict)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name of class Numbered is 5"):
        resolve_eviction(type("Numbered", (PythonLru,), {"name": 5}))


def test_an_error_without_a_text_is_still_the_policys(blocks: Blocks) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("never shown")

    def mute(*_: Any) -> None:
        raise Mute

    def garbled(*_: Any) -> None:
        raise ValueError("\udc80")

    for action, says in ((mute, r"evict\(\) raised Mute$"), (garbled, r"raised ValueError: \?$")):
        tiers = make(blocks, Moody, 4)
        use(tiers, 0, [0, 1, 2, 3])
        Moody.turn("evict", action)
        with pytest.raises(PolicyError, match=says):
            tiers.acquire(experts(1, [0]))
        Moody.action = None
        assert_all_is_well(tiers, blocks, 4)


@pytest.mark.parametrize("method", ["insert", "touch", "evict", "begin_event"])
def test_policies_cannot_call_the_runtime(blocks: Blocks, method: str) -> None:
    tiers = make(blocks, Moody, 4)
    use(tiers, 0, [0, 1, 2, 3])
    event = tiers.acquire(experts(0, [0]), stream=1)
    calls: list[Callable[[], Any]] = [
        lambda: tiers.acquire(experts(0, [1])),
        lambda: tiers.hint(experts(0, [1])),
        lambda: tiers.resident(expert(0, 1)),
        lambda: tiers.resize_hbm(PAGE),
        lambda: tiers.throttle("nvme_to_hbm", 1.0),
        lambda: tiers.remove_space(0),
        lambda: tiers.closed,
        lambda: event.wait_any(),
        lambda: event.release(),
        tiers.stats,
        tiers.close,
    ]
    for number, call in enumerate(calls):

        def act(self: Moody, *arguments: Any, call: Callable[[], Any] = call) -> Any:
            result = getattr(PythonLru, method)(self, *arguments) if method != "evict" else None
            call()
            return result

        Moody.turn(method, act)
        with pytest.raises(
            PolicyError, match=f"{method}.* raised ConfigError: a policy can't call"
        ):
            tiers.acquire(experts(0, [0]) if method == "touch" else experts(1, [number]))
        Moody.action = None
    event.release()
    assert_all_is_well(tiers, blocks, 4)


def test_evictable_is_good_during_the_call_only(blocks: Blocks) -> None:
    kept: list[Callable[[int], bool]] = []

    def keep(self: Moody, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        kept.append(evictable)
        assert not evictable(12345)  # no block at all: no error, and never a victim
        return PythonLru.evict(self, evictable, incoming)

    Moody.turn("evict", keep)
    tiers = make(blocks, Moody, 4)
    use(tiers, 0, [0, 1, 2, 3])
    use(tiers, 1, [0])
    with pytest.raises(ConfigError, match=r"during evict\(\) only"):
        kept[0](expert(0, 1))
    tiers.close()
    with pytest.raises(ConfigError, match=r"during evict\(\) only"):
        kept[0](expert(0, 1))


def test_a_shrink_may_ask_for_any_block(blocks: Blocks) -> None:
    asked: list[bool] = []

    def ask(self: Moody, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        assert incoming is None
        asked.append(evictable(12345))
        return PythonLru.evict(self, evictable, incoming)

    tiers = make(blocks, Moody, 8)
    use(tiers, 0, list(range(8)))
    held = [tiers.acquire(experts(0, [index]), index) for index in (1, 4, 7)]
    Moody.turn("evict", ask)
    tiers.resize_hbm(4 * PAGE)
    for event in held:
        assert not wait_all(event)
        event.release()
    assert tiers.stats()["hbm_nbytes_used"] <= 4 * PAGE
    assert not any(asked)
    Moody.action = None
    assert_all_is_well(tiers, blocks, 4)


@pytest.mark.parametrize("method", ["evict", "touch"])
def test_an_interrupt_in_a_policy_reaches_the_caller(blocks: Blocks, method: str) -> None:
    def interrupt(self: Moody, *arguments: Any) -> None:
        if method == "touch":
            PythonLru.touch(self, *arguments)
        raise KeyboardInterrupt

    tiers = make(blocks, Moody, 4)
    use(tiers, 0, [0, 1, 2, 3])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []
    try:
        Moody.turn(method, interrupt)
        try:
            tiers.acquire(experts(0, [0]) if method == "touch" else experts(1, [0]))
        except PolicyError as error:
            seen.append(str(error))
        for _ in range(1000):  # an interrupt comes at the next chance that Python has
            pass
    except KeyboardInterrupt:
        seen.append("interrupted")
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[-1] == "interrupted"
    assert all(f"{method}() raised KeyboardInterrupt" in text for text in seen[:-1])
    Moody.action = None
    assert_all_is_well(tiers, blocks, 4)


# --- a model, threads, processes ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved.make("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("eviction", [PythonLru, Moody])
def test_a_model_says_the_same(saved: Saved, eviction: type[EvictionPolicy]) -> None:
    expected = generate(saved.model, prompt())
    with saved.on_tiers(eviction=eviction) as model:
        assert torch.equal(generate(model, prompt()), expected)
        assert model.tiered_mem.stats().num_evictions > 0


@pytest.mark.parametrize("method", ["evict", "insert", "begin_event"])
@pytest.mark.parametrize("after", [0, 20])
def test_a_model_survives_a_policy_that_misbehaves(saved: Saved, method: str, after: int) -> None:
    left = [after]

    def act(self: Moody, *arguments: Any) -> Any:
        left[0] -= 1
        result = getattr(PythonLru, method)(self, *arguments)
        if left[0] < 0:
            fail()
        return result

    def act_on_evict(self: Moody, *arguments: Any) -> Any:
        left[0] -= 1
        return fail() if left[0] < 0 else PythonLru.evict(self, *arguments)

    expected = generate(saved.model, prompt())
    with saved.on_tiers(eviction=Moody) as model:
        Moody.turn(method, act_on_evict if method == "evict" else act)
        with pytest.raises(PolicyError, match=rf"'moody': {method}\(\) raised ValueError"):
            generate(model, prompt())
        Moody.action = None
        for _ in range(2):
            assert torch.equal(generate(model, prompt()), expected)
        counts = model.tiered_mem.stats()
        found = counts.num_hbm_hits + counts.num_in_flight + counts.num_dram_hits
        assert found + counts.num_nvme_reads == counts.num_accesses


def test_threads_share_a_policy(blocks: Blocks) -> None:
    tiers = make(blocks, PythonLru, 8, 4)
    memory = memory_of(tiers)
    started = threading.Barrier(6)

    def run(seed: int) -> None:
        rng = random.Random(seed)
        started.wait(30)
        for step in range(40):
            keys = experts(step % NUM_LAYERS, rng.sample(range(NUM_EXPERTS), 3))
            event = tiers.acquire(keys, seed)
            tiers.hint(experts((step + 1) % NUM_LAYERS, [rng.randrange(NUM_EXPERTS)]), seed)
            assert not wait_all(event)
            assert_right_bytes(memory, event, keys, blocks)
            if step % 3:
                event.release()  # else by the garbage collector
            del event
            gc.collect(0)

    assert in_threads([lambda seed=seed: run(seed) for seed in range(6)]) == [None] * 6
    assert tiers.stats()["num_events"] == 240
    assert_all_is_well(tiers, blocks, 8)
    tiers.close()


def test_an_event_may_end_inside_a_policy(blocks: Blocks) -> None:
    """A garbage collection comes anywhere: here it ends events within the policy's call."""
    kept: list[Any] = []

    def drop(self: Moody, *arguments: Any) -> Any:
        kept.clear()
        gc.collect(1)
        return getattr(PythonLru, Moody.method)(self, *arguments)

    tiers = make(blocks, Moody, 6)
    for method in ("insert", "evict", "touch"):
        for layer in range(NUM_LAYERS):
            use(tiers, layer, [0, 1, 2, 3, 4, 5])
            cycle: list[Any] = [tiers.acquire(experts(layer, [0]), stream=1)]
            cycle.append(cycle)
            kept.append(cycle)
            del cycle
            Moody.turn(method, drop)
            use(tiers, layer, [1])  # touches
            use(tiers, (layer + 1) % NUM_LAYERS, [9])  # evicts and inserts
            Moody.action = None
            assert not kept
    assert_all_is_well(tiers, blocks, 6)


def run_python(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code on tiers with a Python policy in a process of its own."""
    head = """
        import os, sys, threading
        from pathlib import Path
        from blocks import *
        from python_policies import PythonLru
        from tiered_mem import _core
        from tiered_mem.policy import resolve_eviction

        blocks = write_blocks(Path(sys.argv[1]) / "blocks", uniform(3, 12, PAGE))

        def make(hbm, dram):
            name = resolve_eviction(PythonLru)
            tiers = _core.Tiers(hbm=hbm * PAGE, dram=dram * PAGE, eviction=name)
            blocks.add_to(tiers)
            return tiers

        def use(tiers, layer, indices, stream=0):
            event = tiers.acquire(experts(layer, indices), stream)
            assert not wait_all(event)
            event.release()

        tiers = make(4, 3)
        use(tiers, 0, [0, 1, 2, 3])
    """
    return subprocess.run(
        [sys.executable, "-c", dedent(head) + dedent(source), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent,
        check=False,
    )


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "event = tiers.acquire(experts(1, [0, 1]))",
        "kept = [tiers]; kept.append(kept); del tiers",
        "import atexit; atexit.register(use, tiers, 2, [5])",
        """
        def forever():
            step = 0
            while True:
                use(tiers, step % 3, [step % 12], 1)
                step += 1

        threading.Thread(target=forever, daemon=True).start()
        use(tiers, 1, [1])
        """,
    ],
)
def test_the_interpreter_ends_with_a_live_policy(ending: str, tmp_path: Path) -> None:
    done = run_python(ending, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_leaves_the_policy_alone(tmp_path: Path) -> None:
    done = run_python(
        """
        child = os.fork()
        if child == 0:
            try:
                use(tiers, 1, [0])
            except Exception as error:
                print(type(error).__name__, flush=True)
            del tiers
            own = make(4, 0)
            use(own, 1, [0, 1])
            print(own.stats()["num_events"], flush=True)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        use(tiers, 1, [0, 1])
        print(tiers.stats()["num_events"])
        """,
        tmp_path,
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["RuntimeClosedError", "1", "2"]


def test_two_classes_of_one_name_are_refused() -> None:
    def make(qualname: str) -> type[EvictionPolicy]:
        made = type("Mine", (PythonLru,), {"name": "one-of-two"})
        made.__qualname__ = qualname
        return made

    assert resolve_eviction(make("First")) == "one-of-two"
    assert resolve_eviction(make("First")) == "one-of-two"  # its module, loaded again
    with pytest.raises(PolicyError, match=r"Second.*First.*'one-of-two'.*another name"):
        resolve_eviction(make("Second"))

"""The simulator: counts and times by hand, against policies alone, and what it refuses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiered_mem.policies.prefetch import BUILT_INS as PREDICTORS
from tiny_traces import PAGE, machine_of, trace_of

from tiered_mem import _core
from tiered_mem.errors import ConfigError, EventTooLargeError, PolicyError
from tiered_mem.keys import Kind
from tiered_mem.simulate import LinkSpeed, Log, Machine, Run, simulate
from tiered_mem.trace import Form, Phase, Trace, TraceHeader

POLICIES = [name for name, _, _ in _core.eviction_policies() if "(" not in name]
ONLINE = [name for name in POLICIES if name != "belady"]
NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2


def run(trace: Trace, num_slots: int, **options: Any) -> Run:
    options = {"machine": machine_of()} | options
    return simulate(trace, hbm=num_slots * PAGE, **options)


def routes(num_tokens: int = 40, seed: int = 0, **per_event: Any) -> Trace:
    """Tokens through three layers, two experts each, that follow one another somewhat."""
    rng = random.Random(seed)
    chosen = [rng.sample(range(NUM_EXPERTS), TOP_K) for _ in range(NUM_LAYERS)]
    index = []
    for _ in range(num_tokens):
        for layer in range(NUM_LAYERS):
            if rng.random() < 0.5:
                chosen[layer] = rng.sample(range(NUM_EXPERTS), TOP_K)
            index += chosen[layer]
    step, layer = np.divmod(np.arange(len(index)) // TOP_K, NUM_LAYERS)
    header = TraceHeader(
        Form.EVENTS,
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        expert_nbytes=(PAGE,) * NUM_LAYERS,
    )
    return Trace.from_rows(header, index=index, step=step, layer=layer, nbytes=PAGE, **per_event)


# --- counts ---


@pytest.mark.parametrize(
    ("eviction", "num_hits"),
    [
        # 0 1 2 0 3 0 1 in three slots. LRU: 3 evicts 1, 1 evicts 2. FIFO: 3 evicts 0, 0 evicts 1.
        ("lru", 2),
        ("fifo", 1),
        ("sieve", 2),
        ("belady", 3),
    ],
)
def test_hits_by_hand(eviction: str, num_hits: int) -> None:
    log: list[Log] = []
    counted = run(
        trace_of([(0,), (1,), (2,), (0,), (3,), (0,), (1,)]),
        3,
        eviction=eviction,
        on_log=log.append,
    )
    assert (counted.num_accesses, counted.num_hits, counted.num_misses) == (
        7,
        num_hits,
        7 - num_hits,
    )
    assert counted.num_evictions == 7 - num_hits - 3
    assert counted.byte_miss_ratio == pytest.approx(1 - num_hits / 7)
    assert counted.hit_rate == num_hits / 7
    assert counted.nbytes_moved == {
        "nvme_to_hbm": (7 - num_hits) * PAGE,
        "dram_to_hbm": 0,
        "hbm_to_dram": 0,
    }
    names = [_core.HAPPENINGS[happening] for happening in log[0].happenings]
    assert names.count("hit") == num_hits
    assert names.count("event") == 7
    assert json.loads(json.dumps(counted.as_dict()))["eviction"] == eviction


def test_dram_takes_what_leaves_and_gives_it_back() -> None:
    counted = run(trace_of([(0,), (1,), (0,), (1,)]), 1, dram=2 * PAGE)
    assert counted.num_hits == 0
    assert counted.num_dram_hits == 2
    assert counted.nbytes_moved == {
        "nvme_to_hbm": 2 * PAGE,
        "dram_to_hbm": 2 * PAGE,
        "hbm_to_dram": 2 * PAGE,
    }
    # Reads take 1 s, copies half: 0 comes; it leaves, 1 comes; it leaves, 0 comes; 1 comes.
    assert counted.stall_seconds == pytest.approx(1 + 1.5 + 1 + 0.5)


def flat_trace(seed: int, count: int = 500, form: Form = Form.EVENTS) -> Trace:
    """Every event is one access."""
    rng = random.Random(seed)
    index = [min(int(rng.paretovariate(0.6)), 40) for _ in range(count)]
    layer = [rng.randrange(3) for _ in index]
    step = np.arange(count)
    return Trace.from_rows(TraceHeader(form), index=index, layer=layer, step=step, nbytes=PAGE)


@pytest.mark.parametrize("wrap", ["{}", "per-layer({})"])
@pytest.mark.parametrize("policy", ONLINE)
def test_events_of_one_access_miss_as_the_policy_alone(policy: str, wrap: str) -> None:
    eviction = wrap.format(policy)
    trace = flat_trace(1)
    # Layers share bytes here, slots there: the same only where the shares are whole slots.
    for num_slots in (1, 8, 30) if wrap == "{}" else (6, 30):
        misses = _core.count_misses(eviction, trace.flat_keys, num_slots)
        assert run(trace, num_slots, eviction=eviction).num_misses == misses
    requests = flat_trace(1, form=Form.REQUESTS)
    assert run(requests, 6, eviction=eviction).num_misses == _core.count_misses(
        eviction, trace.flat_keys, 6
    )


@pytest.mark.parametrize("num_slots", [2, 6, 15])
def test_belady_misses_least(num_slots: int) -> None:
    for trace in (flat_trace(2), flat_trace(3)):
        least = run(trace, num_slots, eviction="belady").num_misses
        assert least <= min(run(trace, num_slots, eviction=p).num_misses for p in ONLINE)
        assert least == _core.count_misses("belady", trace.flat_keys, num_slots)


def test_what_no_order_can_help() -> None:
    trace = routes()
    everything = run(trace, NUM_LAYERS * NUM_EXPERTS)
    assert everything.num_misses == len(trace.blocks[0])
    assert everything.num_evictions == 0
    # An event that is larger than HBM comes in waves, the block that is there first.
    waves = run(trace_of([(0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]), 1)
    assert waves.num_misses == 9
    assert waves.stall_seconds == 9


def test_sequences_interleave_as_they_did() -> None:
    # Two sequences on the same layers: each evicts the other's blocks, or shares them.
    index, sequence = [0, 4, 0, 4, 0, 4], [0, 1, 0, 1, 0, 1]
    rows = {"index": index, "sequence": sequence, "step": [0, 0, 1, 1, 2, 2], "nbytes": PAGE}
    trace = Trace.from_rows(TraceHeader(Form.EVENTS), **rows)
    assert run(trace, 1).num_hits == 0
    assert run(trace, 2).num_hits == 4
    assert run(trace, 2).num_tokens == 6
    shared = Trace.from_rows(TraceHeader(Form.EVENTS), **rows | {"index": [0] * 6})
    assert run(shared, 1).num_hits == 5


def test_oracles_look_ahead_in_their_own_sequence() -> None:
    rng = random.Random(4)
    index = [i for _ in range(120) for i in rng.sample(range(NUM_EXPERTS), 2)]
    event = np.arange(240) // 2
    layer, sequence, step = event // 2 % NUM_LAYERS, event % 2, event // 2 // NUM_LAYERS
    header = TraceHeader(Form.EVENTS, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS)
    trace = Trace.from_rows(
        header, index=index, layer=layer, sequence=sequence, step=step, nbytes=PAGE
    )
    machine = Machine(LinkSpeed(PAGE), LinkSpeed(2 * PAGE), compute=PAGE)
    counted = run(trace, 20, prefetch="oracle(1)", machine=machine)
    assert counted.num_prefetched > 0
    # All guesses are right, and none is lost before its event comes.
    assert counted.num_prefetched_used == counted.num_prefetched
    assert counted.wasted_prefetch_nbytes == 0


def test_phases_and_kinds_add_up() -> None:
    # A prompt of two tokens, whose layers are one event each, then two tokens; and KV beside it.
    rows = [
        # step, layer, index, phase, kind
        *[(t, 0, i, Phase.PREFILL, Kind.EXPERT) for t in (0, 1) for i in (0, 1 + t)],
        *[(t, 1, i, Phase.PREFILL, Kind.EXPERT) for t in (0, 1) for i in (0, 1)],
        *[(2, 0, i, Phase.DECODE, Kind.EXPERT) for i in (0, 2)],
        *[(2, 0, i, Phase.DECODE, Kind.KV) for i in (5,)],
        *[(3, 0, i, Phase.DECODE, Kind.EXPERT) for i in (0, 3)],
        *[(3, 0, i, Phase.DECODE, Kind.KV) for i in (5, 6)],
    ]
    step, layer, index, phase, kind = zip(*rows, strict=True)
    trace = Trace.from_rows(
        TraceHeader(Form.EVENTS),
        step=step,
        layer=layer,
        index=index,
        phase=phase,
        kind=kind,
        nbytes=PAGE,
    )
    counted = run(trace, 20)
    assert (counted.num_events, counted.num_tokens) == (6, 4)
    assert counted.prefill == {"num_accesses": 5, "num_hits": 0, "stall_seconds": 5}
    assert counted.decode == {"num_accesses": 7, "num_hits": 4, "stall_seconds": 3}
    assert counted.hits_by_kind == {
        "expert": {"num_accesses": 9, "num_hits": 3},
        "kv": {"num_accesses": 3, "num_hits": 1},
    }
    assert (counted.num_accesses, counted.num_hits) == (12, 4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 16),
    num_slots=st.integers(2, 24),
    eviction=st.sampled_from([*ONLINE, "per-layer(lfu)"]),
    prefetch=st.sampled_from(["none", "oracle(0.5)", "oracle(1,2)", "transition"]),
    dram=st.sampled_from([0, 6 * PAGE]),
    compute=st.sampled_from([math.inf, PAGE, 4 * PAGE]),
)
def test_accounts_add_up(
    seed: int, num_slots: int, eviction: str, prefetch: str, dram: int, compute: float
) -> None:
    machine = Machine(LinkSpeed(PAGE, 0.1), LinkSpeed(3 * PAGE, 0.01), compute)
    logs: list[Log] = []
    counted = run(
        routes(15, seed),
        num_slots,
        eviction=eviction,
        prefetch=prefetch,
        dram=dram,
        machine=machine,
        on_log=logs.append,
    )
    assert counted.num_hits + counted.num_misses == counted.num_accesses
    assert counted.num_in_flight + counted.num_dram_hits <= counted.num_misses
    assert counted.decode["num_accesses"] == counted.num_accesses
    assert counted.decode["num_hits"] == counted.num_hits
    assert counted.decode["stall_seconds"] == pytest.approx(counted.stall_seconds)
    assert counted.total_seconds == counted.stall_seconds + counted.compute_seconds
    demanded = counted.num_misses - counted.num_in_flight
    read = counted.nbytes_moved["nvme_to_hbm"] + counted.nbytes_moved["dram_to_hbm"]
    assert read >= demanded * PAGE
    assert read <= (demanded + counted.num_prefetched) * PAGE
    named = [_core.HAPPENINGS[happening] for happening in logs[0].happenings]
    for happening, count in (
        ("hit", counted.num_hits),
        ("in_flight", counted.num_in_flight),
        ("dram_hit", counted.num_dram_hits),
        ("prefetch", counted.num_prefetched),
        ("nvme_read", demanded - counted.num_dram_hits),
    ):
        assert named.count(happening) == count


# --- time ---


def test_recorded_times_are_kept() -> None:
    events = [(0, 1), (2,), (0,)]
    trace = trace_of(events, work=[4, 2, 1])
    counted = run(trace, 8)
    # A block a second: 0 at 1, 1 at 2; computing 2 s for each block; 2 at 6, 0 is there.
    assert counted.compute_seconds == 7
    assert counted.stall_seconds == 1 + 1
    assert counted.total_seconds == 9
    assert counted.stall_per_token_seconds == pytest.approx(2 / 3)


def test_computing_before_an_event_hides_a_guess() -> None:
    header = TraceHeader(Form.EVENTS, num_layers=2, dense_nbytes=(2 * PAGE, PAGE))
    rows = {"index": [0, 0, 1, 1], "layer": [0, 1, 0, 1], "step": [0, 0, 1, 1], "nbytes": PAGE}
    trace = Trace.from_rows(header, **rows)
    machine = Machine(LinkSpeed(PAGE), LinkSpeed(PAGE), compute=PAGE)
    counted = run(trace, 16, machine=machine)
    assert counted.compute_seconds == 6 + 4  # dense layers, and blocks
    assert counted.stall_seconds == 4
    assert run(trace, 16, prefetch="oracle(1)", machine=machine).compute_seconds == 10


@pytest.mark.parametrize("compute", [4 * PAGE, PAGE, PAGE / 8])
def test_an_oracle_stalls_less_than_none(compute: float) -> None:
    machine = Machine(LinkSpeed(PAGE, 0.05), LinkSpeed(2 * PAGE), compute)
    for seed in range(3):
        trace = routes(40, seed)
        for num_slots in (8, 16):
            oracle, none = (
                run(trace, num_slots, prefetch=prefetch, machine=machine)
                for prefetch in ("oracle(1)", "none")
            )
            assert oracle.stall_seconds < none.stall_seconds
            assert oracle.compute_seconds == none.compute_seconds


@pytest.mark.parametrize("prefetch", [name for name in PREDICTORS if name != "hash-exact"])
def test_every_predictor_runs(prefetch: str) -> None:
    trace = routes(30)
    if prefetch == "learned":
        with pytest.raises(ConfigError, match="learned"):
            run(trace, 12, prefetch="learned")
        return
    if prefetch == "next-gate":
        # Recorded predictions: what the next event will use, as if gates were never wrong.
        ahead = np.roll(trace.keys.reshape(-1, TOP_K), -1, axis=0).astype(np.uint32)
        offsets = np.arange(0, ahead.size + 1, TOP_K)
        trace = routes(30, ahead_index=ahead.ravel(), ahead_offset=offsets)
    machine = Machine(LinkSpeed(PAGE), LinkSpeed(PAGE), compute=PAGE)
    counted = run(trace, 16, prefetch=prefetch, machine=machine)
    none = run(trace, 16, machine=machine)
    assert counted.prefetch == prefetch
    if prefetch == "none":
        assert counted.num_hints == counted.num_prefetched == 0
    else:
        assert counted.num_hints > 0
        assert counted.num_prefetched_used <= counted.num_prefetched
    if prefetch in ("next-gate", "oracle"):
        assert counted.num_prefetched_used > 0
        assert counted.stall_seconds < none.stall_seconds
    assert counted.num_accesses == none.num_accesses


# --- prefixes ---


def prefix_trace(requests: Sequence[Sequence[int]]) -> Trace:
    index = [block for request in requests for block in request]
    step = [number for number, request in enumerate(requests) for _ in request]
    return Trace.from_rows(
        TraceHeader(Form.PREFIX), index=index, step=step, kind=Kind.KV, nbytes=PAGE
    )


def test_only_contiguous_prefixes_are_hits() -> None:
    requests = [[0, 1, 2], [0, 1, 3], [7, 1, 2], [0, 1, 2, 3]]
    counted = run(prefix_trace(requests), 16)
    # The third has 1 and 2 in HBM, but they follow 7, which is new.
    assert counted.num_hits == 0 + 2 + 0 + 4
    assert counted.num_accesses == 13
    assert counted.hits_by_kind == {"kv": {"num_accesses": 13, "num_hits": 6}}
    assert counted.prefill == {"num_accesses": 13, "num_hits": 6}
    # What is new is computed; what was seen before and is no hit is read: 1 and 2, once.
    assert counted.nbytes_moved["nvme_to_hbm"] == 2 * PAGE
    assert counted.stall_seconds == 2


def test_evicted_prefixes_are_read_again() -> None:
    counted = run(prefix_trace([[0, 1], [2, 3], [0, 1]]), 2)
    assert counted.num_hits == 0
    assert counted.num_evictions == 4
    assert counted.nbytes_moved["nvme_to_hbm"] == 2 * PAGE
    belady = run(prefix_trace([[0], [1], [0], [2], [0]]), 1)
    assert belady.num_hits == 0


def test_a_request_larger_than_hbm_keeps_what_fits() -> None:
    counted = run(prefix_trace([range(6), range(6), range(2)]), 4)
    assert counted.num_hits == 0 + 4 + 2
    assert counted.num_evictions == 0
    assert counted.nbytes_moved["nvme_to_hbm"] == 2 * PAGE


# --- what is refused ---


def events_trace(**options: Any) -> Trace:
    return trace_of([(0, 1), (2, 3)], **options)


@pytest.mark.parametrize(
    ("trace", "options", "says"),
    [
        (events_trace(), {"eviction": "magic"}, "unknown eviction policy 'magic'"),
        (events_trace(), {"eviction": "per-layer(magic)"}, "unknown eviction policy 'magic'"),
        (events_trace(), {"eviction": 7}, "neither a policy's name nor a class"),
        (events_trace(), {"eviction": "belady", "dram": PAGE}, "leave dram at 0"),
        (events_trace(), {"prefetch": "psychic"}, "prefetch='psychic' is no predictor"),
        (events_trace(), {"prefetch": "next-gate"}, "holds no predictions of gates"),
        (events_trace(), {"prefetch": "hash-exact"}, r"use oracle\(1\)"),
        (events_trace(), {"prefetch": "oracle(2)"}, "recall"),
        (events_trace(), {"prefetch": "oracle(1,9)"}, "lookahead of 9 events"),
        (flat_trace(1, 4, Form.REQUESTS), {"prefetch": "oracle(1)"}, "no layers to predict"),
        (prefix_trace([[0]]), {"prefetch": "transition"}, "no layers to predict"),
        (prefix_trace([[0]]), {"dram": PAGE}, "runs without DRAM"),
        (flat_trace(1, 4, Form.REQUESTS), {"dram": PAGE}, "runs without DRAM"),
    ],
)
def test_what_cannot_run_is_refused(trace: Trace, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(trace, 4, **options)


def test_an_hbm_without_a_slot_is_refused() -> None:
    for hbm in (0, PAGE - 1):
        with pytest.raises(EventTooLargeError, match="HBM budget"):
            simulate(events_trace(), hbm=hbm, machine=machine_of())
    large = trace_of([(0,)], sizes=[5 * PAGE])
    with pytest.raises(EventTooLargeError, match="HBM budget"):
        run(large, 4)


@pytest.mark.parametrize(
    ("speed", "latency"),
    [(0, 0), (-1, 0), (math.nan, 0), (1, -1), (1, math.nan)],
)
def test_links_that_cannot_be_are_refused(speed: float, latency: float) -> None:
    with pytest.raises(ConfigError, match="a link of"):
        LinkSpeed(speed, latency)


def test_devices_that_cannot_be_are_refused() -> None:
    for compute in (0, -1, math.nan):
        with pytest.raises(ConfigError, match="compute is"):
            Machine(LinkSpeed(1), LinkSpeed(1), compute)
    assert LinkSpeed(4, 0.5).seconds(8) == 2.5


def test_a_predictor_that_names_what_is_not_there_is_refused() -> None:
    class Beyond(PREDICTORS["none"]):  # type: ignore[misc, name-defined]
        name = "beyond"
        follows_routes = True

        def predict(self, route: Any) -> list[int]:
            return [route.num_experts]

    with pytest.raises(PolicyError, match=r"'Beyond'.*experts are 0 to 7"):
        run(routes(), 12, prefetch=Beyond())

"""The figures of a trace, each against a plain count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem.keys import Kind
from tiered_mem.trace import Form, Phase, Trace, TraceHeader
from tiered_mem.trace_info import PERCENTILES, examine, reuse_distances


def count_distances(accesses: Sequence[int]) -> list[int]:
    """The definition: distinct blocks since the last access to the same one."""
    distances = []
    for i, block in enumerate(accesses):
        if block in accesses[:i]:
            before = max(j for j in range(i) if accesses[j] == block)
            distances.append(len(set(accesses[before + 1 : i])))
    return distances


def flat(indices: Sequence[int], **columns: Any) -> Trace:
    return Trace.from_rows(
        TraceHeader(Form.REQUESTS), index=indices, nbytes=10, kind=Kind.KV, **columns
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80))
def test_reuse_distances_are_those_of_the_definition(accesses: list[int]) -> None:
    distances, share = reuse_distances(np.array(accesses), len(accesses))
    assert distances.tolist() == count_distances(accesses)
    assert share == 1


def test_a_cycle_is_as_far_as_it_is_long() -> None:
    info = examine(flat([*range(100)] * 5))
    assert info.reuse_distances == dict.fromkeys(PERCENTILES, 99)
    assert info.ceiling == 0.8
    assert examine(flat([1, 2, 3])).reuse_distances == {}


def test_distances_of_a_sample_come_close() -> None:
    rng = np.random.default_rng(1)
    accesses = (rng.zipf(1.1, 200_000) % 20_000).tolist()
    exact = examine(flat(accesses))
    sampled = examine(flat(accesses), exact_num_accesses=60_000)
    assert (exact.sampled_share, sampled.sampled_share) == (1, 0.3)
    for percent in (50, 75, 90, 99):
        estimate = sampled.reuse_distances[percent]
        assert estimate == pytest.approx(exact.reuse_distances[percent], rel=0.2)


def routes() -> Trace:
    """Two experts of four, two layers; a prefill of three tokens and three tokens of decode."""
    rows = [  # phase, step, layer, experts
        (0, 0, 0, (0, 1)),
        (0, 1, 0, (0, 2)),
        (0, 2, 0, (0, 1)),
        (0, 2, 1, (3, 2)),
        (1, 3, 0, (0, 1)),
        (1, 3, 1, (3, 1)),
        (1, 4, 0, (0, 2)),
        (1, 4, 1, (3, 1)),
        (1, 5, 0, (1, 2)),
        (1, 5, 1, (0, 2)),
    ]
    header = TraceHeader(
        Form.EVENTS, num_layers=2, num_experts=4, top_k=2, expert_nbytes=(100, 200)
    )
    phase, step, layer = (np.repeat([row[i] for row in rows], 2) for i in range(3))
    index = [expert for row in rows for expert in row[3]]
    nbytes = (layer + 1) * 100
    return Trace.from_rows(header, phase=phase, step=step, layer=layer, index=index, nbytes=nbytes)


def test_figures_of_routes() -> None:
    info = examine(routes())
    assert (info.num_rows, info.num_events, info.num_accesses, info.num_tokens) == (20, 8, 17, 6)
    assert info.accesses_by_kind == {"EXPERT": 17}
    assert info.accesses_by_phase == {"PREFILL": 5, "DECODE": 12}
    assert (info.num_blocks, info.nbytes, info.total_nbytes) == (7, 3 * 100 + 4 * 200, 1200)
    assert info.accessed_nbytes == 9 * 100 + 8 * 200
    assert (info.largest_event_num_blocks, info.largest_event_nbytes) == (3, 400)
    assert (info.cycle_num_slots, info.cycle_nbytes) == (4, 2 * 100 + 2 * 200)
    assert info.num_compulsory_misses == 7
    assert info.ceiling == pytest.approx(10 / 17)
    # Of layer 0's eight accesses after a first token 1 + 1 come again, of layer 1's 2 + 0.
    assert info.previous_token_recall == 4 / 8
    # Layer 0 asks for three of four experts alike, layer 1 for 2, 2, 1 and 3 of eight times.
    shares = [3 / 8, 2 / 8, 2 / 8, 1 / 8]
    entropies = [math.log2(3) / 2, -sum(p * math.log2(p) for p in shares) / 2]
    assert info.layer_entropy == pytest.approx(sum(entropies) / 2)
    assert info.top_tenth_share == 3 / 17


def test_sequences_are_kept_apart() -> None:
    header = TraceHeader(Form.EVENTS)
    columns: dict[str, Any] = {"step": [0, 0, 1, 1], "sequence": [0, 1, 0, 1], "nbytes": 1}
    repeats = Trace.from_rows(header, index=[5, 6, 5, 6], **columns)
    assert examine(repeats).previous_token_recall == 1
    crossed = Trace.from_rows(header, index=[5, 6, 6, 5], **columns)
    assert examine(crossed).previous_token_recall == 0
    assert examine(crossed).num_sequences == 2
    single = Trace.from_rows(header, index=[5], nbytes=1)
    assert examine(single).previous_token_recall is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=1, max_size=12
    )
)
def test_the_recall_is_that_of_plain_sets(tokens: list[list[int]]) -> None:
    rows = [(step, index) for step, experts in enumerate(tokens) for index in experts]
    step, index = zip(*rows, strict=True)
    trace = Trace.from_rows(TraceHeader(Form.EVENTS), step=step, index=index, nbytes=1)
    pairs = list(pairwise(tokens))
    recall = examine(trace).previous_token_recall
    if pairs:
        again = sum(len({*before} & {*now}) for before, now in pairs)
        assert recall == again / sum(len(now) for _, now in pairs)
    else:
        assert recall is None


def test_ceiling_of_prefixes_counts_what_no_gap_cuts_off() -> None:
    header = TraceHeader(Form.PREFIX, block_num_tokens=16)
    chains = [[1, 2, 3], [1, 2, 4, 3], [5, 1, 2], [1, 2, 3]]
    lengths = [len(chain) for chain in chains]
    trace = Trace.from_rows(
        header,
        index=np.concatenate(chains),
        step=np.repeat(range(4), lengths),
        kind=Kind.KV,
        phase=Phase.PREFILL,
        nbytes=7,
    )
    info = examine(trace)
    # None of the first; 1 and 2 of the second, but 3 stands behind 4; none of the third; all.
    assert info.ceiling == 5 / 13
    assert (info.cycle_num_slots, info.previous_token_recall) == (None, None)


def test_the_cycle_is_measured_where_the_header_has_no_top_k() -> None:
    trace = routes()
    bare = Trace.from_rows(
        TraceHeader(Form.EVENTS),
        index=trace.flat_keys & np.uint64(0xFFFFFFFF),
        layer=trace.flat_keys >> np.uint64(32) & np.uint64(0xFFFF),
        step=trace.row_step,
        phase=trace.row_phase,
        block_nbytes=trace.blocks[1],
    )
    info = examine(bare)
    assert (info.cycle_num_slots, info.cycle_nbytes) == (4, 600)
    assert info.num_layers == 2
    assert info.total_nbytes == info.nbytes == 1100


def test_figures_can_be_written_as_json() -> None:
    for trace in (routes(), flat([3, 3])):
        found = examine(trace).as_dict()
        assert all(
            isinstance(value, str | int | float | dict | tuple | None)
            and not isinstance(value, np.generic)
            for value in found.values()
        )

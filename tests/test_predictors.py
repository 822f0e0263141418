"""Predictors on routes without a model: what all of them must keep, and what each of them finds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiered_mem.policies.prefetch import (
    BUILT_INS,
    Decision,
    ModelInfo,
    Oracle,
    Predictor,
    Route,
    make_predictor,
)
from tiered_mem.policies.prefetch.base import PerStream, grown, rank
from tiered_mem.policies.prefetch.learned import Head, Learned
from tiered_mem.policies.prefetch.oracle import _blocks_by_layer

from tiered_mem.errors import ConfigError, PolicyError
from tiered_mem.keys import BlockKey, Kind

NUM_EXPERTS, TOP_K, HIDDEN = 16, 2, 4
SPECS = ["none", "next-gate", "previous-token", "frequency", "frequency(2)", "transition"]
SPECS += ["transition(2)", "eam", "eam(2)", "hash-exact", "learned"]
LEARNING = ["previous-token", "frequency", "transition", "eam"]


def head(num_layers: int, seed: int = 0, units: int = 0) -> Head:
    generator = np.random.default_rng(seed)
    pairs = np.array([(layer, (layer + 1) % num_layers) for layer in range(num_layers)])

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=(num_layers, *shape)).astype(np.float16).astype(np.float32)

    inner = (draw(units, HIDDEN), draw(units)) if units else (None, None)
    weight = draw(NUM_EXPERTS, units or HIDDEN)
    return Head("tiny", NUM_EXPERTS, HIDDEN, pairs, weight, draw(NUM_EXPERTS), *inner)


def make(spec: str, num_layers: int = 3) -> Predictor:
    return Learned(head(num_layers)) if spec == "learned" else make_predictor(spec)


def decision(
    layer: int, ids: Sequence[int], num_layers: int = 3, stream: int = 0, seed: int = 0
) -> Decision:
    """The rest is drawn from the seed."""
    generator = np.random.default_rng([seed, layer])
    return Decision(
        layer,
        (layer + 1) % num_layers,
        ids,
        NUM_EXPERTS,
        TOP_K,
        stream,
        ahead=generator.permutation(NUM_EXPERTS)[: 2 * TOP_K].tolist(),
        state=generator.normal(size=HIDDEN).astype(np.float32),
    )


def routes(
    num_tokens: int, num_layers: int = 3, stream: int = 0, seed: int = 0
) -> Iterator[Decision]:
    """A prompt of all experts, then tokens."""
    generator = np.random.default_rng([seed, stream])
    for token in range(num_tokens):
        for layer in range(num_layers):
            size = NUM_EXPERTS if token == 0 else TOP_K
            ids = generator.permutation(NUM_EXPERTS)[:size].tolist()
            yield decision(layer, ids, num_layers, stream, seed=token)


def answers(predictor: Predictor, told: Sequence[Decision]) -> list[list[int]]:
    return [list(predictor.predict(route)) for route in told]


# --- what holds for all ---


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("spec", SPECS)
def test_guesses_are_distinct_experts_in_reasonable_number(spec: str, num_layers: int) -> None:
    predictor = make(spec, num_layers)
    for route in routes(30, num_layers):
        guess = predictor.predict(route)
        assert len(set(guess)) == len(guess) <= NUM_EXPERTS
        assert all(type(index) is int and 0 <= index < NUM_EXPERTS for index in guess)
        if len(route.experts()) == TOP_K and spec != "previous-token":
            assert len(guess) <= 2 * TOP_K


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_routes_give_the_same_guesses(spec: str) -> None:
    told = list(routes(20))
    assert answers(make(spec), told) == answers(make(spec), told)


@pytest.mark.parametrize("spec", SPECS)
def test_events_without_experts_are_taken(spec: str) -> None:
    predictor = make(spec)
    for layer in (0, 1, 2, 0, 1, 2):
        guess = predictor.predict(decision(layer, []))
        assert len(set(guess)) == len(guess)


@pytest.mark.parametrize("spec", ["previous-token", "next-gate", "learned"])
def test_streams_hear_nothing_of_each_other(spec: str) -> None:
    one, other = list(routes(10, stream=1)), list(routes(10, stream=2))
    together = make(spec)
    mixed = [answers(together, pair) for pair in zip(one, other, strict=True)]
    assert [a for a, _ in mixed] == answers(make(spec), one)
    assert [b for _, b in mixed] == answers(make(spec), other)


def test_transitions_of_interleaved_streams_are_those_of_each() -> None:
    """Expert i is followed by i + 1 in every stream; between streams nothing follows."""
    predictor = make_predictor("transition")
    for token in range(40):
        for layer in range(3):
            for stream in range(4):
                start = 4 * ((token + stream) % 4)
                guess = predictor.predict(decision(layer, [start + layer], stream=stream))
                if token >= 8 and layer < 2:
                    assert guess[0] == start + layer + 1


@pytest.mark.parametrize("spec", SPECS)
def test_many_threads_share_one_predictor(spec: str) -> None:
    predictor = make(spec)
    wrong: list[object] = []

    def follow(stream: int) -> None:
        try:
            for route in routes(60, stream=stream):
                guess = predictor.predict(route)
                if len(set(guess)) != len(guess) or not set(guess) <= set(range(NUM_EXPERTS)):
                    wrong.append(guess)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=follow, args=(stream,)) for stream in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def nbytes_held(value: object, seen: set[int]) -> int:
    """What is reachable: bytes of arrays, 8 for each element of anything else."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        inside: list[object] = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        inside = list(value)
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return 8 * len(inside) + sum(nbytes_held(part, seen) for part in inside)


@pytest.mark.parametrize("spec", SPECS)
def test_memory_is_bounded_however_many_streams_there_were(spec: str) -> None:
    predictor = make(spec)

    def feed(streams: range) -> int:
        for stream in streams:
            for layer in range(3):
                predictor.predict(decision(layer, [stream % NUM_EXPERTS], stream=stream))
        return nbytes_held(predictor, set())

    assert feed(range(300, 900)) <= feed(range(300)) * 1.05


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(LEARNING),
    events=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 2),
            st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True, max_size=NUM_EXPERTS),
        ),
        max_size=40,
    ),
)
def test_any_order_of_layers_is_taken(spec: str, events: list[tuple[int, int, list[int]]]) -> None:
    """A runtime skips layers, is interrupted, and begins anew."""
    predictor = make_predictor(spec)
    for layer, stream, ids in events:
        guess = predictor.predict(decision(layer, ids, num_layers=4, stream=stream))
        assert len(set(guess)) == len(guess)
        assert set(guess) <= set(range(NUM_EXPERTS))


@pytest.mark.parametrize("spec", ["frequency(1)", "transition(1)"])
def test_counts_that_grow_without_end_stay_finite(spec: str) -> None:
    predictor = make_predictor(spec)
    with np.errstate(all="raise", under="ignore"):
        for token in range(400):
            guess = predictor.predict(decision(0, [token % 5], num_layers=1))
    assert guess and set(guess) <= set(range(5))


# --- what each finds ---


def recall(predictor: Predictor, told: Sequence[Decision], from_event: int) -> float:
    """Share of the experts of each event that were guessed at the one before it."""
    right = used = 0
    for i, guess in enumerate(answers(predictor, told)[:-1]):
        if i >= from_event:
            following = set(told[i + 1].ids)
            right, used = right + len(following & set(guess)), used + len(following)
    return right / used


def test_previous_token_goes_on_from_the_last_layer_to_the_first() -> None:
    predictor = make_predictor("previous-token")
    tokens = [[3, 4], [5, 6]], [[7, 8], [9, 10]]
    told = [decision(i, ids, num_layers=2) for token in tokens for i, ids in enumerate(token)]
    assert answers(predictor, told) == [[], [3, 4], [5, 6], [7, 8]]


def test_frequency_ranks_by_use_and_forgets() -> None:
    predictor = make_predictor("frequency(8)")
    for ids in [[1, 2], [1, 3], [1, 2]]:
        guess = predictor.predict(decision(0, ids, num_layers=1))
    assert guess == [1, 2, 3]
    for _ in range(30):
        guess = predictor.predict(decision(0, [9, 10], num_layers=1))
    assert guess[:2] == [9, 10]


def test_transitions_are_learned_across_layers_and_tokens() -> None:
    """Each expert has one successor, in the next layer and from the last to the next token."""
    generator = np.random.default_rng(0)
    successors = [generator.permutation(NUM_EXPERTS) for _ in range(3)]
    ids, told = [0, 5], []
    for step in range(3 * 60):
        told.append(decision(step % 3, ids))
        ids = [int(successors[step % 3][index]) for index in ids]
        if step % 17 == 16:  # or it would go round in a circle
            ids = generator.permutation(NUM_EXPERTS)[:TOP_K].tolist()
    assert recall(make_predictor("transition"), told, from_event=90) > 0.8
    assert recall(make_predictor("frequency"), told, from_event=90) < 0.7


@pytest.mark.parametrize("spec", ["eam", "transition"])
def test_a_path_seen_before_is_recognised(spec: str) -> None:
    generator = np.random.default_rng(1)
    paths = [[generator.permutation(NUM_EXPERTS)[:2].tolist() for _ in range(6)] for _ in range(5)]
    told = [
        decision(layer, ids, num_layers=6)
        for token in generator.integers(5, size=40)
        for layer, ids in enumerate(paths[token])
    ]
    inside = [event for event in range(60, len(told) - 1) if event % 6 < 5]
    guesses = answers(make_predictor(spec), told)
    right = sum(len(set(guesses[e]) & set(told[e + 1].ids)) for e in inside)
    assert right > 0.9 * 2 * len(inside)


def test_what_followed_a_path_is_guessed_for_the_next_token() -> None:
    """Two tokens alternate: after the last layer of one comes the first layer of the other."""
    predictor = make_predictor("eam")
    told = [
        decision(layer, [token * 8 + layer, token * 8 + 4 + layer])
        for token in [0, 1] * 8
        for layer in range(3)
    ]
    guesses = answers(predictor, told)
    for event in range(11, len(told) - 1, 3):
        assert set(guesses[event][:2]) == set(told[event + 1].ids)


def test_a_full_collection_keeps_what_is_unlike() -> None:
    """A rare path is kept, though many passes of one common path came after it."""
    predictor = make_predictor("eam(4)")
    rare, common = [[12, 13], [14, 15], [10, 11]], [[0, 1], [2, 3], [4, 5]]
    for path in [rare] + [common] * 40:
        for layer, ids in enumerate(path):
            predictor.predict(decision(layer, ids))
    assert set(predictor.predict(decision(0, rare[0]))[:2]) == set(rare[1])


def test_a_stream_whose_pass_was_displaced_goes_on() -> None:
    predictor = make_predictor("eam(2)")
    for layer in range(3):
        for stream in range(5):
            guess = predictor.predict(decision(layer, [layer, stream], stream=stream))
            assert len(set(guess)) == len(guess)


# --- learned ---


@pytest.mark.parametrize("units", [0, 3])
def test_a_head_is_what_was_saved_and_scores_as_it_says(tmp_path: Path, units: int) -> None:
    path = tmp_path / "a,b.npz"
    made = head(2, units=units)
    with path.open("wb") as file:
        made.save(file)
    predictor = make_predictor(f"learned({path})")
    route = decision(0, [1, 2], num_layers=2)
    x = route.residual() / np.sqrt(np.mean(route.residual() ** 2))
    if units:
        x = np.maximum(made.inner_weight[0] @ x + made.inner_bias[0], 0)
    scores = made.weight[0] @ x + made.bias[0]
    assert predictor.predict(route) == np.argsort(-scores)[: 2 * TOP_K].tolist()


def test_without_a_residual_or_a_pair_of_layers_it_says_nothing() -> None:
    predictor = Learned(head(3))
    assert predictor.predict(decision(0, [1])._replace(state=None)) == ()
    assert predictor.predict(decision(0, [1])._replace(state=np.zeros(HIDDEN, np.float32))) == ()
    assert predictor.predict(decision(0, [1])._replace(next_layer=2)) == ()


def test_a_head_of_another_model_is_refused_by_name() -> None:
    predictor = Learned(head(3), "tiny.npz")
    predictor.check(ModelInfo("some/where/tiny", NUM_EXPERTS, HIDDEN))
    predictor.check(ModelInfo("tiny/", NUM_EXPERTS))
    with pytest.raises(ConfigError, match=r"tiny\.npz is a head for 'tiny', .* is 'huge'"):
        predictor.check(ModelInfo("huge", NUM_EXPERTS, HIDDEN))
    with pytest.raises(ConfigError, match=r"of 16 experts and .* this one has 8"):
        predictor.check(ModelInfo("tiny", 8, HIDDEN))
    with pytest.raises(ConfigError, match=r"hidden size 4; this one has 16 and 5"):
        predictor.check(ModelInfo("tiny", NUM_EXPERTS, 5))


def broken_heads() -> dict[str, Callable[[Path], None]]:
    def cut(path: Path) -> None:
        with path.open("wb") as file:
            head(2).save(file)
        path.write_bytes(path.read_bytes()[:-200])

    def shape(path: Path) -> None:
        with path.open("wb") as file:
            head(2)._replace(bias=np.zeros((2, 3), np.float32)).save(file)

    def pickled(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, header=np.array([{"format": 1}], object))

    return {
        "no head": lambda path: path.write_bytes(b"nothing") and None,
        "cut": cut,
        "shape": shape,
        "pickled": pickled,
        "other": lambda path: np.savez(path, weight=np.zeros(3)),
    }


@pytest.mark.parametrize("what", broken_heads())
def test_a_file_that_is_no_head_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "head.npz"
    broken_heads()[what](path)
    with pytest.raises(ConfigError, match=r"head\.npz is no head .*train-head"):
        make_predictor(f"learned({path})")


# --- oracle ---


def future(
    num_tokens: int, num_layers: int = 4, num_sequences: int = 2, num_experts: int | None = 16
) -> SimpleNamespace:
    """What an oracle reads of a trace, of sequences that take turns."""
    generator = np.random.default_rng(0)
    keys, offsets, layers, sequences = [], [0], [], []
    for _ in range(num_tokens):
        for sequence in range(num_sequences):
            for layer in range(num_layers):
                ids = generator.permutation(NUM_EXPERTS)[:TOP_K]
                keys += [BlockKey(Kind.EXPERT, layer, int(index)).pack() for index in ids]
                offsets.append(len(keys))
                layers.append(layer)
                sequences.append(sequence)
    return SimpleNamespace(
        header=SimpleNamespace(num_experts=num_experts),
        keys=np.array(keys, np.uint64),
        offsets=np.array(offsets),
        event_layer=np.array(layers, np.uint16),
        event_sequence=np.array(sequences, np.uint32),
    )


def oracle(spec: str, trace: SimpleNamespace, seed: int = 0) -> Oracle:
    made = make_predictor(spec, simulator=True)
    assert isinstance(made, Oracle)
    made.foresee(trace, seed)
    return made


def ids_of(trace: SimpleNamespace, event: int) -> list[int]:
    keys = trace.keys[trace.offsets[event] : trace.offsets[event + 1]]
    return [BlockKey.unpack(int(key)).index for key in keys]


@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_an_oracle_hints_every_later_event_of_its_sequence_once(lookahead: int) -> None:
    trace = future(5)
    seer = oracle(f"oracle(1,{lookahead})", trace)
    for sequence in range(2):
        events = np.flatnonzero(trace.event_sequence == sequence).tolist()
        hinted = [(at, hint) for at, event in enumerate(events) for hint in seer.hints(event)]
        expected = [(int(trace.event_layer[e]), set(ids_of(trace, e))) for e in events[1:]]
        assert [(layer, set(ids)) for _, (layer, ids) in hinted] == expected
        # The k-th event after the first is hinted `lookahead` before, or at the very beginning.
        assert [at for at, _ in hinted] == [max(0, k + 1 - lookahead) for k in range(len(expected))]


@pytest.mark.parametrize("share", [0, 0.25, 0.8, 1])
def test_an_oracle_is_right_as_often_as_it_is_told_to_be(share: float) -> None:
    trace = future(300)
    seer = oracle(f"oracle({share})", trace)
    right = total = first_right = 0
    for event in range(len(trace.event_layer) - 8):
        for _, ids in seer.hints(event):
            following = next(
                e
                for e in range(event + 1, event + 9)
                if trace.event_sequence[e] == trace.event_sequence[event]
            )
            used = set(ids_of(trace, following))
            assert len(ids) == len(set(ids)) == TOP_K and max(ids) < NUM_EXPERTS
            right, total = right + len(used & set(ids)), total + len(ids)
            first_right += ids[0] in used
    assert right / total == pytest.approx(share, abs=0.03)
    assert first_right / (total / TOP_K) == pytest.approx(share, abs=0.04)  # the order says nothing


def test_an_oracle_errs_the_same_way_for_the_same_seed() -> None:
    trace = future(20)

    def told(seed: int) -> list[object]:
        seer = oracle("oracle(0.5,2)", trace, seed)
        return [seer.hints(event) for event in range(len(trace.event_layer))]

    assert told(1) == told(1) != told(2)


def test_an_oracle_of_an_unknown_model_errs_by_blocks_that_the_trace_names() -> None:
    trace = future(3, num_experts=None)
    seen = {layer: set() for layer in range(4)}
    for event, layer in enumerate(trace.event_layer.tolist()):
        seen[layer] |= set(ids_of(trace, event))
    seer = oracle("oracle(0)", trace)
    for event in range(len(trace.event_layer)):
        for layer, ids in seer.hints(event):
            assert set(ids) <= seen[layer]


def test_an_oracle_has_no_wrong_answer_where_all_are_right() -> None:
    trace = future(2, num_layers=1, num_sequences=1)
    trace.keys = np.array([BlockKey(Kind.EXPERT, 0, i).pack() for i in range(4)], np.uint64)
    trace.header.num_experts = 2
    trace.keys[2:] = trace.keys[:2]
    assert oracle("oracle(0)", trace).hints(0) == [(0, [])]


def test_an_oracle_works_in_the_simulator_alone_and_not_beyond_a_token() -> None:
    with pytest.raises(ConfigError, match="works in the simulator alone"):
        make_predictor("oracle(0.8)")
    with pytest.raises(ConfigError, match="recorded trace alone"):
        make_predictor("oracle(0.8)", simulator=True).predict(decision(0, [1]))
    with pytest.raises(ConfigError, match="set one of 1 to 4"):
        oracle("oracle(1,5)", future(2))


# --- specs ---


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("none(1)", "takes no arguments"),
        ("next-gate(2)", "takes no arguments"),
        ("frequency(0)", "the half life is '0'.*number from 1 to"),
        ("frequency(nan)", "the half life is 'nan'"),
        ("frequency(1,2)", "the half life is '1,2'"),
        ("transition(soon)", "the half life is 'soon'"),
        ("eam(1)", "the capacity is '1'.*whole number from 2 to 4096"),
        ("eam(2.5)", "the capacity is '2.5'"),
        ("learned", r"learned\(PATH.npz\)"),
        ("learned(/nowhere.npz)", "there is no head /nowhere.npz"),
        ("oracle(1.1)", "the recall is '1.1'.*number from 0 to 1"),
        ("oracle(0.5,0)", "the lookahead is '0'"),
        ("oracle(0.5,1,1)", "no more"),
        ("nothing(1)", "'nothing.1.' is no predictor; choose one of eam, frequency"),
        ("eam(", "write name or name"),
        ("", "write name or name"),
    ],
)
def test_specs_that_cannot_be_are_refused(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_predictor(spec, simulator=True)


def test_specs_may_hold_spaces() -> None:
    assert make_predictor(" frequency ( 12 ) ").name == "frequency"
    made = make_predictor("oracle( 0.5, 3 )", simulator=True)
    assert isinstance(made, Oracle) and (made.recall, made.lookahead) == (0.5, 3)


def test_every_predictor_has_a_file_and_every_file_a_predictor() -> None:
    files = {
        path.stem for path in Path(sys.modules[Oracle.__module__].__file__).parent.glob("*.py")
    }
    of_one = {cls.__module__.rpartition(".")[2] for cls in BUILT_INS.values()}
    assert len(of_one) == len(BUILT_INS)
    assert files - of_one == {"__init__", "base", "checked"}


# --- a predictor of one's own ---


class Own(Predictor):
    """Answers what it was given."""

    name = "own"

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def predict(self, route: Route) -> Sequence[int]:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([0, 16], r"predicted \[0, 16\] for layer 1: experts are 0 to 15"),
        ([-1], "experts are 0 to 15"),
        ([1, 2, 1], "some are named twice"),
        ([1.0], "a sequence of integers is wanted"),
        (["1"], "a sequence of integers is wanted"),
        (None, "a sequence of integers is wanted"),
        (7, "a sequence of integers is wanted"),
        (ValueError("no idea"), r"raised ValueError\('no idea'\) when asked for layer 1"),
    ],
)
def test_what_cannot_be_is_refused_in_the_name_of_who_said_it(answer: object, says: str) -> None:
    with pytest.raises(PolicyError, match=rf"predictor 'Own' .*{says}"):
        make_predictor(Own(answer)).predict(decision(0, [1]))


def test_arrays_and_tuples_are_taken() -> None:
    for answer in (np.array([3, 1]), (3, 1), np.array([3, 1], np.uint8), range(3, 0, -2)):
        assert make_predictor(Own(answer)).predict(decision(0, [1])) == [3, 1]


def test_what_is_asked_of_a_predictor_of_ones_own_is_what_it_says() -> None:
    class Blind(Own):
        uses_tables = follows_routes = learns = False
        looks_ahead = uses_residual = True

    made = make_predictor(Blind([]))
    assert (made.uses_tables, made.follows_routes, made.learns) == (False, False, False)
    assert (made.looks_ahead, made.uses_residual, made.name) == (True, True, "own")
    assert make_predictor(made) is made


# --- parts ---


def test_the_stream_that_was_silent_for_longest_is_forgotten() -> None:
    states = PerStream(list, limit=2)
    states.of(1).append("one")
    states.of(2).append("two")
    states.of(1)
    states.of(3)
    assert states.of(1) == ["one"] and states.of(2) == [] and len(states) == 2


def test_rank_leaves_out_zeros_and_breaks_ties_by_id() -> None:
    assert rank(np.array([0, 2, 3, 2, 0, 1.0]), 4) == [2, 1, 3, 5]
    assert rank(np.array([0, 2, 3, 2, 0, 1.0]), 2) == [2, 1]
    assert rank(np.zeros(3), 2) == rank(np.zeros(0), 2) == []


def test_arrays_grow_and_keep_what_they_hold() -> None:
    array = grown(np.ones((2, 3), np.float32), 3, 1)
    assert array.shape == (3, 3) and array.sum() == 6 and array[2].sum() == 0
    assert grown(array, 2, 2) is array


def test_only_experts_are_drawn_beyond_what_a_trace_names() -> None:
    keys = np.array([BlockKey(Kind.EXPERT, 2, 5).pack(), BlockKey(Kind.KV, 2, 7).pack()], np.uint64)
    pools = _blocks_by_layer(keys, num_experts=4)
    expert, kv = (BlockKey(kind, 2, 0).pack() >> 32 for kind in (Kind.EXPERT, Kind.KV))
    assert pools[expert].tolist() == [0, 1, 2, 3, 5]
    assert pools[kv].tolist() == [7]

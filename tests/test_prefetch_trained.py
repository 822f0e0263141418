"""Predictors in the trained model: recording for them, training a head, and what they reach.

Shares of right guesses are counted, and compared with chance: k of E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiered_mem.policies.prefetch import Route
from tiered_mem.policies.prefetch.learned import Head
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import tiered_mem
from tiered_mem.cli import invoke
from tiered_mem.errors import ConfigError, TraceError
from tiered_mem.hf.head import Lesson, train_head
from tiered_mem.trace import Phase, Trace, TraceHeader

MODEL = Path(__file__).parents[1] / "benchmarks" / "models" / "tiny-moe"
NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 6, 32, 4, 128
NUM_TOKENS, NUM_SHORT = 120, 48
TEXT = """
And it came to pass in those days, that the king went up to the house of his fathers, and all the
people of the land went with him. And he said unto them, What is this that ye have done? My lord,
we have done nothing but that which was good in thine eyes. Then came there a man out of the field,
and told the king, saying, Thy servants are slain, and thy house is burned with fire. O heavy hour!
Speak, is the noble duke alive or dead? I know not, sir; he gave me charge to bring you hither. Now
therefore arise, go forth, and speak comfortably unto thy servants: for I swear by the Lord, if thou
go not forth, there will not tarry one with thee this night.
"""


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    tokens: torch.Tensor = AutoTokenizer.from_pretrained(MODEL)(TEXT, return_tensors="pt")
    assert tokens["input_ids"].shape[1] > NUM_TOKENS
    return tokens["input_ids"][:, :NUM_TOKENS]


@pytest.fixture(scope="module")
def expected(text: torch.Tensor) -> torch.Tensor:
    return decode(AutoModelForCausalLM.from_pretrained(MODEL).eval(), text[:, :NUM_SHORT])


@contextmanager
def on_tiers(store: Path, **options: Any) -> Iterator[Any]:
    model = tiered_mem.from_pretrained(MODEL, hbm="25%", dram=0, nvme=store, **options)
    try:
        yield model
    finally:
        model.tiered_mem.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny-moe") / "store"


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Feed tokens one by one after a prompt of four; return the logits of the last."""
    cache = DynamicCache(config=model.config)
    pieces = [tokens[:, :4], *tokens[:, 4:].split(1, dim=1)]
    for piece in pieces:
        logits = model(piece, past_key_values=cache).logits
    return logits[0, -1]


class Seen:
    """What an observer was shown, in columns."""

    def __init__(self) -> None:
        self.routes: list[tuple[int, list[int], np.ndarray | None, list[int]]] = []

    def __call__(self, route: Route) -> None:
        experts, ahead = list(route.experts()), list(route.look_ahead())
        self.routes.append((route.layer, experts, route.residual(), ahead))

    def trace(self, model: str = "tiny-moe") -> Trace:
        routes = [route for route in self.routes if len(route[1]) == TOP_K]
        ahead = [ids for *_, ids in routes]
        return Trace.from_rows(
            TraceHeader(
                "events", model, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K
            ),
            name="seen",
            index=[index for _, ids, *_ in routes for index in ids],
            layer=[layer for layer, ids, *_ in routes for _ in ids],
            step=[i // NUM_LAYERS for i, (_, ids, *_) in enumerate(routes) for _ in ids],
            nbytes=[1] * sum(len(ids) for _, ids, *_ in routes),
            hidden=np.array([residual for *_, residual, _ in routes], np.float16),
            ahead_offset=np.cumsum([0, *map(len, ahead)]).astype(np.uint32),
            ahead_index=np.array([index for ids in ahead for index in ids], np.uint32),
        )


@pytest.fixture(scope="module")
def seen(store: Path, text: torch.Tensor) -> Seen:
    """The text's routes; what came before them has let the hooks find their places."""
    shown = Seen()
    with on_tiers(store, prefetch="none") as model:
        model.tiered_mem.hooks.observe(shown)
        decode(model, text[:, :6])
        shown.routes.clear()
        decode(model, text)
        model.tiered_mem.hooks.observe(None)
        before = len(shown.routes)
        decode(model, text[:, :6])
        assert len(shown.routes) == before
    return shown


@pytest.fixture(scope="module")
def trace(seen: Seen) -> Trace:
    return seen.trace()


@pytest.fixture(scope="module")
def head_file(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "head.npz"
    head, _ = train_head(trace, held_out=0.2)
    with path.open("wb") as file:
        head.save(file)
    return path


# --- recording ---


def test_an_observer_sees_each_layer_step_with_what_a_trace_holds(seen: Seen) -> None:
    num_steps = NUM_TOKENS - 3  # the prompt is one
    assert [layer for layer, *_ in seen.routes] == list(range(NUM_LAYERS)) * num_steps
    for layer, experts, residual, ahead in seen.routes:
        assert residual is not None and residual.shape == (HIDDEN,)
        assert residual.dtype == np.float32 and np.isfinite(residual).all()
        assert len(set(experts)) == len(experts)
        if layer == NUM_LAYERS - 1:
            assert not ahead
        else:
            assert len(set(ahead)) == len(ahead) >= 2 * TOP_K


def test_the_residual_is_what_the_router_saw(seen: Seen) -> None:
    """Norm and gate of the layer itself, on the residual that was shown, choose what it chose."""
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    last = seen.routes[-NUM_LAYERS:]
    for (layer, experts, residual, _), block in zip(last, model.model.layers, strict=True):
        normed = block.post_attention_layernorm(torch.from_numpy(residual).bfloat16()[None])
        chosen = (normed @ block.mlp.gate.weight.T).topk(TOP_K).indices[0]
        assert set(chosen.tolist()) == set(experts), layer


def test_the_observed_model_says_what_it_says_alone(
    store: Path, text: torch.Tensor, expected: torch.Tensor
) -> None:
    with on_tiers(store, prefetch="transition") as model:
        model.tiered_mem.hooks.observe(Seen())
        assert torch.equal(decode(model, text[:, :NUM_SHORT]), expected)


# --- training ---


def test_a_head_learns_more_than_counts_do(trace: Trace) -> None:
    _, report = train_head(trace, held_out=0.2, epochs=10)
    assert report.num_held_out == pytest.approx(0.2 * trace.num_events, abs=2)
    assert report.num_trained + report.num_held_out == trace.num_events - 1
    assert set(report.recall) == {
        "learned",
        "next-gate",
        "previous-token",
        "frequency",
        "transition",
        "eam",
    }
    for found in report.recall.values():
        assert TOP_K / NUM_EXPERTS < found.at_k <= found.at_2k <= 1
    learned = report.recall["learned"]
    for name in ("previous-token", "frequency"):
        assert learned.at_k > report.recall[name].at_k + 0.1
        assert learned.at_2k > report.recall[name].at_2k + 0.1


@pytest.mark.parametrize("units", [0, 8])
def test_the_same_seed_trains_the_same_head(trace: Trace, units: int) -> None:
    one, other, third = (
        train_head(trace, units=units, epochs=2, seed=seed)[0] for seed in (1, 1, 2)
    )
    for name in Head._fields:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert not np.array_equal(one.weight, third.weight)
    assert (one.inner_weight is None) == (units == 0)
    assert [tuple(pair) for pair in one.pairs] == [(i, (i + 1) % 6) for i in range(6)]


def with_sequences(trace: Trace, lengths: list[int]) -> Trace:
    """The same events, cut into sequences of so many."""
    of_event = np.repeat(np.arange(len(lengths)), lengths)
    sizes = np.diff(trace.offsets)
    return replace(trace, row_sequence=np.repeat(of_event, sizes).astype(np.uint32))


def test_the_last_sequences_are_held_out_not_events_at_random(trace: Trace) -> None:
    lengths = [200, 200, 200, trace.num_events - 600]
    lesson = Lesson.of(with_sequences(trace, lengths), 0.25)
    assert not lesson.held_out[lesson.source < 600].any()
    assert lesson.held_out[lesson.source >= 600].all()
    # The last event of a sequence has none that follows it.
    assert not {199, 399, 599} & set(lesson.source.tolist())
    single = Lesson.of(trace, 0.25)
    assert single.held_out[-single.held_out.sum() :].all()
    assert single.held_out.mean() == pytest.approx(0.25, abs=0.01)


def test_prompts_and_unknown_residuals_teach_nothing(trace: Trace) -> None:
    phase = trace.row_phase.copy()
    phase[: trace.offsets[60]] = Phase.PREFILL
    hidden = trace.hidden.copy()
    hidden[100], hidden[101] = 0, np.nan
    lesson = Lesson.of(replace(trace, row_phase=phase, hidden=hidden), 0.25)
    assert lesson.source.min() >= 60
    assert not {100, 101} & set(lesson.source.tolist())
    assert {99, 102} <= set(lesson.source.tolist())


def test_traces_that_cannot_teach_are_refused(trace: Trace) -> None:
    with pytest.raises(TraceError, match="seen has no hidden states"):
        train_head(replace(trace, hidden=None))
    with pytest.raises(TraceError, match="how many experts"):
        train_head(replace(trace, header=replace(trace.header, num_experts=None)))
    with pytest.raises(TraceError, match="no decode events with hidden states"):
        train_head(replace(trace, hidden=np.zeros_like(trace.hidden)))
    with pytest.raises(TraceError, match="too short"):
        train_head(trace, held_out=1e-6)
    for option in ({"held_out": 0}, {"held_out": 1.5}, {"units": -1}, {"epochs": 0}):
        with pytest.raises(ConfigError, match=r"must|at least"):
            train_head(trace, **option)


def test_the_command_trains_and_says_what_it_reaches(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.save(tmp_path / "t.npz")
    command = [
        "train-head",
        str(tmp_path / "t.npz"),
        "-o",
        str(tmp_path / "h.npz"),
        "--epochs",
        "2",
    ]
    assert invoke(command) == 0
    printed = capsys.readouterr().out
    for name in ("learned", "next-gate", "previous-token", "frequency"):
        assert name in printed
    assert Head.load(tmp_path / "h.npz").model == "tiny-moe"
    assert invoke(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert invoke([*command, "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["head"].endswith("h.npz") and 0 < told["recall"]["learned"]["at_k"] <= 1


# --- in the runtime ---


@pytest.mark.parametrize("name", ["frequency", "transition", "eam", "learned"])
def test_predictors_run_in_a_model_that_says_the_same(
    name: str, store: Path, text: torch.Tensor, expected: torch.Tensor, head_file: Path
) -> None:
    spec = f"learned({head_file})" if name == "learned" else name
    with on_tiers(store, prefetch=spec) as model:
        assert torch.equal(decode(model, text[:, :NUM_SHORT]), expected)
        report = model.tiered_mem.prefetch_report()
        assert report["predictor"] == name
        assert all(note == name for note in report["notes"].values())
        hints = sum(layer["num_hints"] for layer in report["layers"].values())
        right = sum(layer["num_right"] for layer in report["layers"].values())
    assert hints > NUM_LAYERS * NUM_SHORT
    assert right / hints > 1.2 * TOP_K / NUM_EXPERTS


def test_the_head_of_another_model_is_refused(trace: Trace, tmp_path: Path) -> None:
    head, _ = train_head(trace, epochs=1)
    with (tmp_path / "other.npz").open("wb") as file:
        head._replace(model="gpt-oss-20b").save(file)
    spec = f"learned({tmp_path}/other.npz)"
    # Before anything is packed.
    with (
        pytest.raises(ConfigError, match="head for 'gpt-oss-20b', this model is 'tiny-moe'"),
        on_tiers(tmp_path / "new", prefetch=spec),
    ):
        pass
    assert not (tmp_path / "new").exists()
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ConfigError, match="head for 'gpt-oss-20b'"):
        tiered_mem.offload(model, nvme=tmp_path / "new", prefetch=spec)
    assert not (tmp_path / "new").exists()

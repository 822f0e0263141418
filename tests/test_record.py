"""Recording a model's events, and fidelity: a run and its replay decide the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiered_mem
from tiered_mem import _core
from tiered_mem.errors import RuntimeClosedError, TraceError
from tiered_mem.policy import EvictionPolicy
from tiered_mem.simulate import LinkSpeed, Machine, simulate
from tiered_mem.stats import Log
from tiered_mem.trace import Form, Phase, Trace

MODEL = Path(__file__).parent.parent / "benchmarks" / "models" / "tiny-moe"
MACHINE = Machine(LinkSpeed(2e9, 1e-4), LinkSpeed(2e10), 1e11)
NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 32, 4
PLAIN = [name for name, _, _ in _core.eviction_policies() if "(" not in name and name != "belady"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def wrap(store: Path, **options: Any) -> Any:
    return tiered_mem.from_pretrained(MODEL, nvme=store, **({"dram": 0} | options))


@pytest.fixture
def model(store: Path) -> Iterator[Any]:
    model = wrap(store, hbm="25%", prefetch="none")
    yield model
    model.tiered_mem.close()


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 2000, (1, count), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, prompt: int = 9, new: int = 12, seed: int = 1) -> None:
    torch.manual_seed(seed)
    ids = tokens(prompt, seed)
    options = {"do_sample": True, "min_new_tokens": new, "max_new_tokens": new}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def test_a_trace_is_what_the_routers_said(model: Any, tmp_path: Path) -> None:
    routed: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, a, out: routed.append(out[-1]))
    with model.tiered_mem.record() as recorder:
        generate(model, seed=1)
        generate(model, seed=2)
    trace = recorder.trace("tiny", source="a test")
    assert trace.num_events == len(routed) == 2 * 12 * NUM_LAYERS
    for i, ids in enumerate(routed):
        assert sorted(trace.event(i) & np.uint64(0xFFFF)) == torch.unique(ids).tolist()
        assert trace.event_layer[i] == i % NUM_LAYERS
    assert trace.header.form is Form.EVENTS and trace.header.model == "tiny-moe"
    assert trace.header.num_experts == NUM_EXPERTS and trace.header.top_k == TOP_K
    first = np.flatnonzero(trace.event_phase == Phase.PREFILL)
    assert first.tolist() == [*range(6), *range(72, 78)]  # a prompt's layers, of either sequence
    assert trace.event_sequence.tolist() == [0] * 72 + [1] * 72
    assert trace.event_step[6:24].tolist() == [9] * 6 + [10] * 6 + [11] * 6
    assert trace.compute_seconds is not None and (trace.compute_seconds >= 0).all()
    assert np.allclose(np.add.reduceat(trace.weight, trace.offsets[:-1])[6:72], 1, atol=0.02)
    trace.save(tmp_path / "t.npz")
    again = Trace.load(tmp_path / "t.npz")
    assert np.array_equal(again.keys, trace.keys) and again.header == trace.header


def test_predictions_and_residuals_are_kept(model: Any) -> None:
    for _ in range(3):  # from then on all is known
        with model.tiered_mem.record():
            model(input_ids=tokens(2))
    with model.tiered_mem.record(hidden=True) as recorder:
        generate(model)
    trace = recorder.trace()
    assert trace.hidden is not None and trace.hidden.shape == (trace.num_events, 128)
    right = [
        len(set(trace.ahead(i).tolist()) & set((trace.event(i + 1) & np.uint64(0xFFFF)).tolist()))
        for i in range(NUM_LAYERS, trace.num_events - 1)
        if trace.event_layer[i] < NUM_LAYERS - 1
    ]
    assert sum(right) > 2 * len(right)  # of four: the gates see what comes
    assert len(trace.ahead(NUM_LAYERS - 1)) == 0  # nothing is known of the next token's first
    with model.tiered_mem.record(predictions=False) as recorder:
        generate(model)
    assert recorder.trace().ahead_index is None


def test_recording_ends(model: Any) -> None:
    with model.tiered_mem.record() as recorder:
        generate(model)
    count = recorder.trace().num_events
    generate(model)
    assert recorder.trace().num_events == count
    with pytest.raises(TraceError, match="nothing was recorded"), model.tiered_mem.record() as none:
        none.trace()
    model.tiered_mem.close()
    with pytest.raises(RuntimeClosedError), model.tiered_mem.record():
        pass


CASES = [*((name, 0) for name in [*PLAIN, "per-layer(lru)"]), ("lru", "20%"), ("arc", "20%")]


@pytest.mark.parametrize(("eviction", "dram"), CASES)
def test_a_replay_decides_as_the_run_did(store: Path, eviction: str, dram: int | str) -> None:
    model = wrap(store, hbm="15%", dram=dram, eviction=eviction, prefetch="none")
    handle = model.tiered_mem
    try:
        handle.runtime.keep_log(True)
        with handle.record(predictions=False) as recorder:
            generate(model, prompt=3, new=25)
        happened = handle.runtime.take_log()
        stats, budgets = handle.stats(), handle.budgets
    finally:
        handle.close()
    logs: list[Log] = []
    run = simulate(
        recorder.trace(),
        hbm=budgets.hbm,
        dram=budgets.dram,
        eviction=eviction,
        machine=MACHINE,
        on_log=logs.append,
    )
    assert np.array_equal(logs[0].keys, happened.keys)
    assert np.array_equal(logs[0].happenings, happened.happenings)
    assert run.num_hits == stats.num_hbm_hits > 0
    assert run.num_dram_hits == stats.num_dram_hits and (run.num_dram_hits > 0) == bool(dram)
    assert run.num_evictions == stats.num_evictions > 0


def test_a_policy_hears_of_each_event_once(store: Path) -> None:
    begun: list[int] = []

    class Counting(EvictionPolicy):
        name = "counting"

        def __init__(self) -> None:
            self.keys: dict[int, None] = {}

        def begin_event(self, layer: int) -> None:
            begun.append(layer)

        def insert(self, key: int, nbytes: int) -> None:
            self.keys[key] = None

        def touch(self, key: int) -> None:
            pass

        def erase(self, key: int) -> None:
            del self.keys[key]

        def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
            key = next((key for key in self.keys if evictable(key)), None)
            if key is not None:
                del self.keys[key]
            return key

    # Five slots: a prompt's events run in waves.
    model = wrap(store, hbm=5 * 36864, prefetch="none", eviction=Counting)
    try:
        with model.tiered_mem.record(predictions=False) as recorder:
            generate(model, prompt=9, new=4)
    finally:
        model.tiered_mem.close()
    assert begun == recorder.trace().event_layer.tolist() == [*range(NUM_LAYERS)] * 4


@torch.no_grad()
@pytest.mark.parametrize("positional", [False, True])
def test_embeddings_for_tokens(model: Any, positional: bool) -> None:
    embeddings = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with model.tiered_mem.record() as recorder:
        if positional:
            model(None, None, None, None, embeddings)
        else:
            model(inputs_embeds=embeddings)
    trace = recorder.trace()
    assert set(trace.row_phase.tolist()) == {Phase.PREFILL}
    assert trace.num_events == NUM_LAYERS


def test_a_forward_without_input_fails_as_the_model_does(model: Any) -> None:
    with model.tiered_mem.record(), pytest.raises(ValueError, match="input_ids"):
        model()

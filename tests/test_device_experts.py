"""Experts computed from the slot pool, as on a GPU, with host memory for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conformance
import families
import pytest
import torch
from adapter import Saved, generate, in_threads, padded_batch, prompt

import tiered_mem
from tiered_mem.device import portable
from tiered_mem.errors import BudgetError, ConfigError
from tiered_mem.hf import device, grouped, pool, wrap
from tiered_mem.hf.device import Home, Way
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.pool import Window, group, window_views

pytestmark = pytest.mark.filterwarnings("ignore::tiered_mem.BudgetWarning")

TAKING_PART = [name for name in families.families() if name not in families.LEFT_OUT]
VARIED = ["qwen3_moe", "nemotron_h", "gpt_oss", "ernie4_5_vl_moe", "deepseek_v4", "qwen4_exp"]
SLOT = 8192


# --- windows ---


def anywhere(address: int) -> tuple[int, int]:
    return 0, 1 << 60


def test_slots_in_order_make_one_window_in_that_order() -> None:
    slots = [4096 + i * SLOT for i in range(100)]
    found = group(slots, SLOT, anywhere)
    assert found == ([Window(4096, 100)], list(range(100)))
    assert group(slots[::-1], SLOT, anywhere).of_slot == list(range(99, -1, -1))


def test_windows_hold_fewer_groups_than_torch_takes() -> None:
    slots = [i * SLOT for i in range(0, 3000, 2)]
    found = group(slots, SLOT, anywhere)
    assert [w.num_slots for w in found.windows] == [1023, 1023, 951]
    for slot, number in zip(slots, found.of_slot, strict=True):
        assert address_of(found, number) == slot


def test_windows_are_of_one_phase_and_one_piece_of_memory() -> None:
    piece = 10 * SLOT
    slots = [i * piece + phase + j * SLOT for i in range(3) for phase in (0, 4096) for j in (1, 4)]
    found = group(slots, SLOT, lambda a: (a // piece * piece, a // piece * piece + piece))
    assert len(found.windows) == 6
    assert all(w.num_slots == 4 for w in found.windows)
    assert [address_of(found, number) for number in found.of_slot] == slots


def address_of(groups: pool.Groups, number: int) -> int:
    for window in groups.windows:
        if number < window.num_slots:
            return window.start + number * SLOT
        number -= window.num_slots
    raise AssertionError("beyond the last window")


def test_views_of_a_window_are_the_fields_of_its_slots() -> None:
    layout = ExpertLayout.build(
        4, {"up_proj": ((3, 16), torch.bfloat16), "bias": ((3,), torch.float32)}
    )
    memory = torch.randint(0, 256, (5 * layout.slot_nbytes,), dtype=torch.uint8)
    start = layout.slot_nbytes
    views = window_views(layout, Window(start, 3), lambda a, n: memory[a : a + n])
    for i in range(3):
        one = layout.views(memory[start + i * layout.slot_nbytes :])
        for name, tensor in one.items():
            assert torch.equal(views[name][i].view(torch.uint8), tensor.view(torch.uint8))
            assert views[name][i].data_ptr() == tensor.data_ptr()


def test_rows_are_sorted_by_group_and_nobodys_come_last() -> None:
    ids = torch.tensor([5, 1, 9, 1, 0, 5])
    table = torch.tensor([3, 0, 3, 3, 3, 2, 3], dtype=torch.int32)  # experts 0 to 5, and nobody
    rows = grouped.sort_rows(ids, table, 3)
    assert rows.order.tolist() == [1, 3, 0, 5, 2, 4]
    assert rows.groups.tolist() == [0, 0, 2, 2, 3, 3]
    assert rows.ends.tolist() == [2, 2, 4] and rows.ends.dtype == torch.int32


# --- models ---


@contextmanager
def pretending(
    monkeypatch: pytest.MonkeyPatch, way: Way | None = None, most: int = pool.MOST_GROUPS
) -> Iterator[None]:
    """Load models to a pretended accelerator: torch's portable backend over host memory.

    `way`: how experts that aren't eager compute there; `most` slots to a window.
    """
    with monkeypatch.context() as patch:
        patch.setattr(wrap, "usable", lambda _: portable.pretended())
        patch.setattr("tiered_mem.hf.experts.MOST_GROUPS", most)
        if way is not None:
            patch.setattr(
                Home, "way", lambda self, dtype, nbytes, eager: Way.EAGER if eager else way
            )
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved.make("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.mark.parametrize("name", TAKING_PART)
def test_every_family_computes_from_the_pool(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = conformance.ask(*families.build(name))
    expected.model.save_pretrained(tmp_path)
    with (
        pretending(monkeypatch, Way.GROUPED, most=2),
        conformance.on_tiers(tmp_path, expected) as model,
    ):
        assert model.tiered_mem.home.uses_pool
        run = conformance.compare(model, expected)
    assert run.difference < conformance.TOLERANCE
    assert run.same_tokens
    assert run.num_waves > run.num_calls and run.stats.num_evictions > 0
    assert run.stats.num_failed == run.stats.num_repaired == 0


@pytest.mark.parametrize(
    ("way", "stock"),
    [(Way.GROUPED, "grouped_mm"), (Way.ONE_BY_ONE, "grouped_mm"), (Way.BATCHED, "batched_mm")],
)
@pytest.mark.parametrize("num_slots", [3, 100], ids=["waves", "resident"])
@pytest.mark.parametrize("name", VARIED)
def test_each_way_is_bitwise_a_stock_function(
    name: str, way: Way, stock: str, num_slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = families.build(name)
    model.save_pretrained(tmp_path)
    dtype = torch.bfloat16
    model = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    model.set_experts_implementation(stock)
    expected = conformance.ask(model, inputs)
    options: dict[str, Any] = {"dtype": dtype, "hbm": num_slots * expected.slot_nbytes}
    with pretending(monkeypatch, way), conformance.on_tiers(tmp_path, expected, **options) as tiers:
        if num_slots == 100:
            tiers.tiered_mem.fill()
            tiers.tiered_mem.reset_stats()
        run = conformance.compare(tiers, expected)
    assert run.difference == 0 and run.same_tokens
    assert (run.num_waves > run.num_calls) == (num_slots == 3)


@pytest.mark.parametrize("way", [Way.GROUPED, Way.BATCHED])
@pytest.mark.parametrize("most", [3, pool.MOST_GROUPS])
def test_the_host_doesnt_ask_where_every_expert_is_resident(
    saved: Saved, way: Way, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = padded_batch()
    expected = generate(saved.model, inputs)
    with pretending(monkeypatch, way, most), saved.on_tiers(hbm="100%", dram=0) as model:
        model.set_experts_implementation("tiered")
        model.tiered_mem.fill()
        model.tiered_mem.reset_stats()
        monkeypatch.setattr("tiered_mem.hf.pooled.to_host", lambda _: pytest.fail("it asked"))
        assert torch.equal(generate(model, inputs), expected)
        stats = model.tiered_mem.stats()
    num_calls = 6 * len(model.tiered_mem.layouts)
    assert stats.num_events == num_calls
    assert stats.num_hbm_hits == stats.num_accesses >= 2 * num_calls


def test_uses_are_counted_as_if_the_host_had_asked(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    for way in (Way.GROUPED, Way.ONE_BY_ONE):  # the second one asks
        with pretending(monkeypatch, way), saved.on_tiers(hbm="100%", dram=0) as model:
            model.set_experts_implementation("tiered")
            model.tiered_mem.fill()
            model.tiered_mem.reset_stats()
            generate(model, prompt())
            stats = model.tiered_mem.stats()
            counted.append((stats.num_events, stats.num_hbm_hits, stats.num_accesses))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("prefetch", ["next-gate", "frequency", "none"])
def test_every_way_to_generate(
    saved: Saved, prefetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = padded_batch()
    with (
        pretending(monkeypatch, Way.GROUPED),
        saved.on_tiers(prefetch=prefetch, hbm_slots=5, experts_implementation=None) as model,
    ):
        for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}):
            tokens = generate(model, inputs, **options)
            assert torch.equal(tokens, generate(saved.model, inputs, **options)), options
        if prefetch != "none":
            assert model.tiered_mem.stats().num_hints > 0


def test_eight_threads_at_once(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(seed, 4 + seed) for seed in range(8)]
    expected = [generate(saved.model, inputs) for inputs in prompts]
    with (
        pretending(monkeypatch, Way.GROUPED),
        saved.on_tiers(hbm_slots=4, experts_implementation=None) as model,
    ):
        results = in_threads([lambda inputs=inputs: generate(model, inputs) for inputs in prompts])
    for result, tokens in zip(results, expected, strict=True):
        assert torch.equal(result, tokens)


def test_no_tokens_and_no_experts(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in (Way.GROUPED, Way.ONE_BY_ONE, Way.BATCHED):
        with pretending(monkeypatch, way), saved.on_tiers(experts_implementation=None) as model:
            experts = model.model.layers[0].mlp.experts
            none = torch.zeros(0, 2, dtype=torch.long)
            assert experts(torch.zeros(0, 32), none, torch.zeros(0, 2)).shape == (0, 32)
            elsewhere = torch.full((3, 2), experts.num_experts)
            outputs = experts(torch.ones(3, 32), elsewhere, torch.ones(3, 2))
            assert torch.equal(outputs, torch.zeros(3, 32))
            some = torch.tensor([[0, experts.num_experts]] * 3)
            outputs = experts(torch.ones(3, 32), some, torch.ones(3, 2))
            alone = experts(torch.ones(3, 32), some, torch.tensor([[1.0, 0.0]] * 3))
            assert torch.equal(outputs, alone) and outputs.abs().sum() > 0


def test_many_rows_are_sorted_on_the_device(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered_mem.hf.pooled._FEW_ROWS", 0)
    inputs = padded_batch()
    for way in (Way.GROUPED, Way.ONE_BY_ONE):
        with (
            pretending(monkeypatch, way, most=2),
            saved.on_tiers(experts_implementation=None) as model,
        ):
            assert torch.equal(generate(model, inputs), generate(saved.model, inputs))


def test_a_model_in_memory_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = conformance.ask(*families.build("qwen3_moe"))
    model, slot = expected.model, expected.slot_nbytes
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    own = set(vars(model))
    with pretending(monkeypatch):
        tiered_mem.offload(model, hbm=3 * slot, dram=4 * slot)
        assert conformance.compare(model, expected).difference == 0
        with monkeypatch.context() as patch:
            patch.setattr("tiered_mem.hf.handle.memory_to_spare", lambda: 1000)
            with pytest.raises(BudgetError, match="stays as it is"):
                model.tiered_mem.unwrap()
        assert conformance.compare(model, expected).same_tokens
        model.tiered_mem.unwrap()
    assert set(vars(model)) == own
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(families.logits(model, expected.inputs), expected.logits)


# --- which device ---


def test_the_device_of_the_layers_with_experts() -> None:
    names = ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    spread = {"model.embed_tokens": "cpu", "model.layers": "cuda:1", "lm_head": 0}
    assert device.home_in_map(names, spread) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"on several.*layers.2"):
        device.home_in_map(names, spread | {"model.layers.2.mlp": "cpu"})
    with pytest.raises(ConfigError, match="names no device"):
        device.home_in_map(names, {"model.layers.1": "cpu"})


@pytest.mark.parametrize(
    ("capability", "dtype", "may"),
    [
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, False),
        ((8, 6), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
    ],
)
def test_where_torch_has_a_kernel(
    capability: tuple[int, int], dtype: torch.dtype, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert grouped.may_have_kernel(torch.device("cuda:0"), dtype) == may
    assert not grouped.may_have_kernel(torch.device("cpu"), dtype)

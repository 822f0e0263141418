"""Running out of device memory in the model's own compute, and the room that is left for it."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from adapter import Saved, generate, padded_batch, prompt
from torch import nn
from transformers import DynamicCache, StaticCache

from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.low_vram import CacheState, bytes_asked_for
from tiered_mem.hf.room import room_for

pytestmark = pytest.mark.filterwarnings("ignore::tiered_mem.BudgetWarning")

ASKED = 5 << 10


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved.make("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 KiB. GPU 0 has ...")


@contextmanager
def failing(model: nn.Module, fails: Callable[[int], bool]) -> Iterator[list[str]]:
    """Let modules raise an OOM before or after they run, in those of their calls that `fails` says.

    Yields the names of the modules that did.
    """
    failed: list[str] = []
    count = 0
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def fail(*_: Any) -> None:
            nonlocal count
            count += 1
            if fails(count):
                failed.append(name)
                raise out_of_memory()

        return fail

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(hook(name)))
            handles.append(module.register_forward_hook(hook(name)))
    try:
        yield failed
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prefetch", ["next-gate", "none"])
def test_tokens_are_the_same_wherever_memory_ran_out(
    saved: Saved, prefetch: str, seed: int
) -> None:
    inputs = padded_batch()
    expected = generate(saved.model, inputs, max_new_tokens=10)
    chance = random.Random(seed)
    with saved.on_tiers(hbm_slots=12, prefetch=prefetch) as model:
        slots = [model.tiered_mem.budgets.hbm]
        with failing(model, lambda _: chance.random() < 0.004) as failed:
            tokens = generate(model, inputs, max_new_tokens=10)
        slots.append(model.tiered_mem.budgets.hbm)
        assert torch.equal(tokens, expected)
        assert failed
        least = model.tiered_mem.runtime.least_hbm()
        assert least <= slots[1] <= max(least, slots[0] - len(failed) * ASKED)
        assert torch.equal(generate(model, inputs), generate(saved.model, inputs))


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v32", "mixtral"])
def test_other_caches(name: str, tmp_path: Any) -> None:
    other = Saved.make(name, tmp_path)
    inputs = prompt(num_tokens=12)  # longer than the window of the sliding layers
    expected = generate(other.model, inputs, max_new_tokens=8)
    with other.on_tiers(hbm_slots=12) as model:
        chance = random.Random(1)
        with failing(model, lambda _: chance.random() < 0.004) as failed:
            assert torch.equal(generate(model, inputs, max_new_tokens=8), expected)
        assert failed


def test_at_the_least_hbm_the_error_goes_up_and_says_so(saved: Saved) -> None:
    with saved.on_tiers(hbm_slots=12) as model:
        runtime = model.tiered_mem.runtime
        with (
            failing(model, lambda _: True),
            pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as raised,
        ):
            generate(model, prompt())
        assert any("HBM has given back all but" in note for note in raised.value.__notes__)
        assert runtime.budgets.hbm == runtime.least_hbm()
        assert runtime.nbytes_used()["hbm"] <= runtime.budgets.hbm
        del raised
        assert torch.equal(generate(model, prompt()), generate(saved.model, prompt()))


def test_a_cache_that_cant_be_taken_back(saved: Saved) -> None:
    inputs = prompt()
    with saved.on_tiers(hbm_slots=12) as model, torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(**inputs, past_key_values=cache)
        before = model.tiered_mem.budgets
        with (
            failing(model, lambda count: count == 20),
            pytest.raises(torch.OutOfMemoryError) as raised,
        ):
            model(inputs["input_ids"][:, :1], past_key_values=cache)
        assert any("StaticLayer in its KV cache" in note for note in raised.value.__notes__)
        assert model.tiered_mem.budgets == before


def test_nothing_of_the_failed_forward_is_alive_in_the_next(saved: Saved) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        kept.append(weakref.ref(output))

    def fail(module: nn.Module, args: Any) -> None:
        if not alive:
            alive.append(-1)
            raise out_of_memory()

    def look(module: nn.Module, args: Any) -> None:
        if alive == [-1]:
            alive[0] = sum(ref() is not None for ref in kept)

    gc.disable()  # what only a collection would free would still be there when it is needed
    try:
        with saved.on_tiers(hbm_slots=12) as model, torch.no_grad():
            model.model.layers[0].mlp.register_forward_hook(keep)
            model.model.layers[-1].mlp.register_forward_pre_hook(fail)
            model.model.embed_tokens.register_forward_pre_hook(look)
            model(**prompt())
    finally:
        gc.enable()
    assert len(kept) == 2 and alive == [0]


def test_a_recording_has_each_forward_once(saved: Saved) -> None:
    traces = []
    for fails in (False, True):
        with saved.on_tiers(hbm_slots=12) as model, model.tiered_mem.record() as recorder:
            with failing(model, lambda count, on=fails: on and count % 150 == 0) as failed:
                generate(model, prompt())
            assert bool(failed) == fails
        traces.append(recorder.trace())
    plain, retried = traces
    assert plain.keys.tolist() == retried.keys.tolist()


def test_growing_layers_are_cut_back_and_new_ones_dropped() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), layer)
    state = CacheState(cache)
    assert state.not_restorable() == ""
    cache.layers[0].keys = torch.zeros(1, 2, 5, 4)  # keys have grown, values haven't
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 2)
    state.restore()
    assert len(cache.layers) == 2
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (1, 2, 3, 4)


def test_what_torch_asked_for() -> None:
    assert bytes_asked_for(out_of_memory()) == ASKED
    assert bytes_asked_for(Exception("tried to allocate 1.50 GiB (GPU 0)")) == 3 << 29
    assert bytes_asked_for(Exception("XPU error")) == 0


# --- room ---


def test_room_of_qwen3_30b() -> None:
    config = SimpleNamespace(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, vocab_size=151936, max_position_embeddings=40960,
        num_experts_per_tok=8,
    )  # fmt: skip
    config.get_text_config = lambda: config
    weights = {"gate_up_proj": ((1536, 2048), torch.bfloat16)}
    weights["down_proj"] = ((2048, 768), torch.bfloat16)
    room = room_for(config, [ExpertLayout.build(128, weights)], torch.bfloat16)
    assert room.kv == 8192 * 2 * 4 * 128 * 2 * 49  # a layer more, which grows
    rows = 4096 * (2 * 2048 + 8 * 3 * (2048 + 768)) * 2
    assert room.activations == rows + 151936 * 6 + 4096 * 8192
    assert room.nbytes == int(1.05 * (room.kv + room.activations))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen4_exp", "gemma4"])
def test_room_for_a_tiny_model_holds_its_cache(name: str) -> None:
    model, _ = families.build(name)
    layouts = [ExpertLayout.of_module(m) for m in families.find_experts(model).values()]
    context = min(8192, model.config.get_text_config().max_position_embeddings)
    room = room_for(model.config, layouts, torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        outputs = model(torch.zeros(1, 8, dtype=torch.long), past_key_values=cache)
    held = sum(
        tensor.nbytes
        for layer in outputs.past_key_values.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4
    )
    assert held / 8 * context <= room.kv
    assert room.activations > 0

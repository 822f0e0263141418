"""Models that select what they read: stock logits, and no block is read that no query sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tiered_mem
from tiered_mem.errors import ConfigError, UnsupportedModelError
from tiered_mem.hf.kv_attention import _wanted
from tiered_mem.hf.kv_cache import TieredLayer
from tiered_mem.hf.kv_indexed import TieredIndexedLayer

BLOCK_TOKENS = 2
BUDGET = 4 * 4096  # a block takes a page: four of them, for three layers
NAMES = ("deepseek_v32", "glm_moe_dsa", "qwen4_exp")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
_stock: dict[str, PreTrainedModel] = {}


def build(name: str) -> PreTrainedModel:
    if name not in _stock:
        torch.manual_seed(0)
        config = families.tiny_config(name)
        model = families.model_class(name)._from_config(config, dtype=torch.float32)
        families._randomise(model.eval())
        _stock[name] = model
    return _stock[name]


@pytest.fixture(params=NAMES)
def stock(request: Any) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def model(stock: PreTrainedModel) -> Iterator[Any]:
    tiered = copy.deepcopy(stock)
    tiered_mem.tier_kv(tiered, BUDGET, block_tokens=BLOCK_TOKENS)
    yield tiered
    tiered.tiered_mem.close()


def prompts(num_tokens: int = 21, padding: int = 0, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, families.VOCABULARY, (batch, num_tokens), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[0, :padding] = mask[0, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def ask(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(7)
    options = {"max_new_tokens": 16, "do_sample": False, **options}
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("padding", [0, 9], ids=["", "padded"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_stock_cache(
    stock: PreTrainedModel, model: Any, way: str, padding: int
) -> None:
    if way == "prompt lookup" and stock._is_stateful:
        pytest.skip("transformers refuses it for models with recurrent states")
    inputs = prompts(padding=padding, batch=1 if way == "prompt lookup" else 2)
    want, got = (ask(m, inputs, **WAYS[way]) for m in (stock, model))
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    cache = got.past_key_values
    assert any(type(layer) is TieredIndexedLayer for layer in cache.layers)
    assert cache.num_gathered == 0
    assert model.tiered_mem.stats().num_nvme_reads > 0


def test_only_blocks_with_a_selected_token_are_read(stock: PreTrainedModel, model: Any) -> None:
    num_steps, cache = 5, model.tiered_mem.cache()
    tokens = prompts(120, batch=1)["input_ids"]
    with torch.no_grad():
        own = DynamicCache(config=stock.config)
        stock(tokens[:, :-num_steps], past_key_values=own)
        model(tokens[:, :-num_steps], past_key_values=cache)
        model.tiered_mem.reset_stats()
        for i in range(tokens.shape[1] - num_steps, tokens.shape[1]):
            want = stock(tokens[:, i : i + 1], past_key_values=own).logits
            got = model(tokens[:, i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # Each step selects 8 tokens (of 120, in 60 blocks) of each layer, and QSA one more of a tail.
    most = 9 * num_steps * cache.num_tiered
    assert 0 < model.tiered_mem.stats().num_accesses <= most


def test_indexer_keys_are_written_where_they_stay(model: Any) -> None:
    cache = model.tiered_mem.cache()
    layer = next(x for x in cache.layers if isinstance(x, TieredIndexedLayer))
    with torch.no_grad():
        model(prompts(20)["input_ids"], past_key_values=cache)
        places = set()
        for token in range(3, 9):
            model(torch.full((2, 1), token), past_key_values=cache)
            places.add(layer.indexer_keys.data_ptr())
    assert layer.indexer_keys.shape[1] == 26
    assert len(places) == 1


def test_indexer_keys_cross_from_inference_mode() -> None:
    stock = build("deepseek_v32")
    model: Any = copy.deepcopy(stock)
    tiered_mem.tier_kv(model, BUDGET, block_tokens=BLOCK_TOKENS)
    tokens = prompts(20)["input_ids"]
    cache = model.tiered_mem.cache()
    with torch.inference_mode():
        model(tokens[:, :-1], past_key_values=cache)
    with torch.no_grad():
        got = model(tokens[:, -1:], past_key_values=cache).logits
        own = DynamicCache(config=stock.config)
        stock(tokens[:, :-1], past_key_values=own)
        want = stock(tokens[:, -1:], past_key_values=own).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    model.tiered_mem.close()


def test_cache_operations(stock: PreTrainedModel, model: Any) -> None:
    if stock.config.model_type.startswith("qwen4"):
        pytest.skip("its recurrent states can't be cut back")
    tokens = prompts(24)["input_ids"]
    cache = model.tiered_mem.cache()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        cache.crop(-7)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model(tokens[1:, 17:].expand(2, -1), past_key_values=cache).logits
        want = stock(tokens[1:]).logits[:, 17:].expand(2, -1, -1)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        cache.reset()
        assert cache.get_seq_length() == 0
        got = model(tokens, past_key_values=cache).logits
        torch.testing.assert_close(got, stock(tokens).logits, atol=1e-5, rtol=1e-5)


def test_closing_gives_the_modules_back() -> None:
    model: Any = copy.deepcopy(build("deepseek_v32"))
    tiered_mem.tier_kv(model, BUDGET)
    attention = model.model.layers[0].self_attn
    assert "expand_kv" in vars(attention)
    model.tiered_mem.close()
    assert "expand_kv" not in vars(attention)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_blocks_of_padding_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    stock = LlamaForCausalLM(config).eval()
    model: Any = copy.deepcopy(stock)
    tiered_mem.tier_kv(model, BUDGET, block_tokens=8)
    read: list[set[int]] = []
    batches = TieredLayer.batches

    def watched(self: TieredLayer, wanted: torch.Tensor | None = None) -> Any:
        places = self._places(self._wanted_groups(wanted))
        read.append({group for where in places.values() for group, _ in where})
        return batches(self, wanted)

    monkeypatch.setattr(TieredLayer, "batches", watched)
    inputs = prompts(40, padding=20, batch=1)
    inputs["input_ids"] %= 64
    got, want = (ask(m, inputs, max_new_tokens=4) for m in (model, stock))
    assert torch.equal(got.sequences, want.sequences)
    model.tiered_mem.close()
    assert read and all(groups == {2, 3, 4} for groups in read)  # not tokens 0 to 15


@pytest.mark.parametrize("additive", [False, True])
def test_what_a_mask_wants(additive: bool) -> None:
    def mask(*rows: list[int]) -> torch.Tensor:
        seen = torch.tensor(rows, dtype=torch.bool)[:, None, None]
        if not additive:
            return seen
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    wanted = _wanted(mask([0, 1, 1], [0, 0, 1]), 3)
    assert wanted is not None and wanted.tolist() == [[False, True, True], [False, False, True]]
    assert _wanted(mask([1, 1, 1]), 3) is None
    assert _wanted(mask([0, 1, 1], [0, 0, 0]), 3) is None  # one sees nothing: the mean of all
    assert _wanted(None, 3) is None


def test_blocks_of_indexed_layers_are_pages() -> None:
    model: Any = copy.deepcopy(build("deepseek_v32"))
    tiered_mem.tier_kv(model, 16 * BUDGET)
    cache = model.tiered_mem.cache()
    with torch.no_grad():
        model(prompts(60)["input_ids"], past_key_values=cache)
    layer = cache.layers[0]
    row = layer.block_nbytes // layer.block_tokens
    assert 4096 <= layer.block_nbytes < 4096 + row  # of 128 tokens otherwise
    model.tiered_mem.close()


def test_a_selection_that_tends_to_come_again_is_hinted() -> None:
    model: Any = copy.deepcopy(build("deepseek_v32"))
    tiered_mem.tier_kv(model, BUDGET, block_tokens=BLOCK_TOKENS)
    cache = model.tiered_mem.cache()
    first = cache.layers[0]
    with torch.no_grad():
        model(prompts(60, batch=1)["input_ids"], past_key_values=cache)
        for _ in range(2):
            model(torch.full((1, 1), 3), past_key_values=cache)
    assert first.repeated is not None and 0 <= first.repeated <= 1
    first.repeated = 0.9
    assert first._likely(1) == first._selected[: len(first._likely(1))] != []
    first.repeated = 0.1
    assert first._likely(1) == []
    cache.crop(-40)
    assert first._likely(1) == first.rows[0][:1]
    model.tiered_mem.close()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def quest(llama: PreTrainedModel, num_tokens: int, **options: Any) -> Any:
    model = copy.deepcopy(llama)
    tiered_mem.tier_kv(model, "64KiB", block_tokens=8, quest_tokens=num_tokens, **options)
    return model


@pytest.mark.parametrize("way", ["greedy", "beams", "chunked prefill", "prompt lookup"])
def test_quest_of_everything_is_exact(llama: PreTrainedModel, way: str) -> None:
    inputs = prompts(30, padding=9, batch=1 if way == "prompt lookup" else 2)
    inputs["input_ids"] %= 64
    model = quest(llama, 1000)
    want, got = (ask(m, inputs, **WAYS[way]) for m in (llama, model))
    assert torch.equal(got.sequences, want.sequences)
    model.tiered_mem.close()


@pytest.mark.parametrize("batch", [1, 2])
def test_quest_reads_as_many_blocks_as_it_says(llama: PreTrainedModel, batch: int) -> None:
    model = quest(llama, 32)
    cache = model.tiered_mem.cache()
    tokens = prompts(203, batch=batch)["input_ids"] % 64
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        model.tiered_mem.reset_stats()
        for _ in range(3):
            model(tokens[:, :1], past_key_values=cache)
    assert model.tiered_mem.stats().num_accesses == 3 * batch * 2 * 4  # steps, rows, layers, blocks
    model.tiered_mem.close()


def test_quest_reads_the_blocks_with_the_best_bounds(llama: PreTrainedModel) -> None:
    model = quest(llama, 32)
    own, cache = DynamicCache(config=llama.config), model.tiered_mem.cache()
    tokens = prompts(90)["input_ids"] % 64
    with torch.no_grad():
        llama(tokens, past_key_values=own)
        model(tokens[:, :60], past_key_values=cache)
        model(tokens[:, 60:], past_key_values=cache)
        cache.crop(-6)
        cache.reorder_cache(torch.tensor([1, 0]))
    layer = cache.layers[0]
    keys = own.layers[0].keys.flip(0)[..., :80, :]
    smallest, largest = layer._bounds
    blocks = keys.unflatten(2, (10, 8))
    torch.testing.assert_close(smallest, blocks.amin(3))
    torch.testing.assert_close(largest, blocks.amax(3))
    query = torch.randn(2, 4, 1, 8)
    chosen = layer.choose(query, None)
    assert chosen.shape == (2, 84) and chosen[:, 80:].all()
    assert chosen.sum(1).tolist() == [4 * 8 + 4] * 2
    # No score of a key is above its block's bound, and the best bounds are chosen.
    scores = (query @ keys.repeat_interleave(2, 1).mT).unflatten(3, (10, 8)).amax(4)[:, :, 0]
    ends = torch.stack([query * bound.repeat_interleave(2, 1) for bound in (smallest, largest)])
    bounds = ends.amax(0).sum(-1)
    assert (bounds >= scores - 1e-5).all()
    order = bounds.softmax(-1).amax(1)[:, 1:-1].argsort(-1, descending=True)[:, :2] + 1
    for row in range(2):
        want = sorted([0, 9, *order[row].tolist()])
        assert chosen[row, :80].unflatten(0, (10, 8)).all(1).nonzero()[:, 0].tolist() == want
    model.tiered_mem.close()


def test_quest_that_cant_be(llama: PreTrainedModel, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="at least 24"):
        quest(llama, 23)
    with pytest.raises(ConfigError, match="prefixes"):
        quest(llama, 32, prefixes=tmp_path)
    with pytest.raises(UnsupportedModelError, match="latents"):
        quest(build("deepseek_v32"), 32)

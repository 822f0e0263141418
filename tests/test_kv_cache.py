"""Tiered KV under generate: the stock cache's tokens, with every block through NVMe."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import tiered_mem
from tiered_mem.errors import (
    AlreadyWrappedError,
    BudgetError,
    ConfigError,
    NoExpertsError,
    RuntimeClosedError,
    TieredMemError,
    UnsupportedModelError,
)
from tiered_mem.hf.kv_cache import TieredCache

MODEL = Path(__file__).parent.parent / "benchmarks" / "models" / "tiny-moe"
# A block of 8 tokens has 1 KiB and takes a page: two layers' worth of one block each.
BLOCK_TOKENS, BUDGET = 8, 8192


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(stock: PreTrainedModel) -> Iterator[Any]:
    tiered = copy.deepcopy(stock)
    tiered_mem.tier_kv(tiered, BUDGET, block_tokens=BLOCK_TOKENS)
    yield tiered
    tiered.tiered_mem.close()


def prompts(padded: bool = False) -> dict[str, torch.Tensor]:
    tokens = torch.randint(2, 64, (2, 21), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :9] = 0
        mask[0, :9] = 0
    return {"input_ids": tokens, "attention_mask": mask}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def ask(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(7)
    options = {"max_new_tokens": 30, "do_sample": False, **options}
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def assert_same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    # Blocks are summed in the order of their arrival: logits above 1 are rounded in proportion.
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_stock_cache(
    stock: PreTrainedModel, model: Any, way: str, padded: bool
) -> None:
    inputs = prompts(padded)
    if way == "prompt lookup":  # takes one sequence
        inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    assert_same(ask(model, inputs, **WAYS[way]), ask(stock, inputs, **WAYS[way]))
    stats = model.tiered_mem.stats()
    assert stats.num_nvme_reads > 0
    assert model.tiered_mem.runtime.nbytes_used()["hbm"] <= BUDGET
    gc.collect()
    model.generate(**inputs, max_new_tokens=12)  # drops what the cache above has abandoned
    assert model.tiered_mem.space.num_blocks == 0


def test_assisted_decoding(stock: PreTrainedModel, model: Any) -> None:
    inputs = {name: tensor[:1] for name, tensor in prompts().items()}
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(stock.config).eval()  # mostly wrong: crops all the time
    assert_same(
        ask(model, inputs, assistant_model=assistant), ask(stock, inputs, assistant_model=assistant)
    )


def test_a_conversation_goes_on_with_its_cache(stock: PreTrainedModel, model: Any) -> None:
    tokens = prompts()["input_ids"]
    caches = model.tiered_mem.cache(), DynamicCache(config=stock.config)
    with torch.no_grad():
        for start, end in ((0, 9), (9, 10), (10, 21)):
            got, want = (
                m(tokens[:, start:end], past_key_values=cache).logits
                for m, cache in zip((model, stock), caches, strict=True)
            )
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert caches[0].get_seq_length() == 21
    assert caches[0].num_gathered == 0


def test_sequences_share_their_prefix(stock: PreTrainedModel, model: Any) -> None:
    tokens = prompts()["input_ids"][:1]
    cache = model.tiered_mem.cache()
    reference = DynamicCache(config=stock.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        stock(tokens, past_key_values=reference)
        before = model.tiered_mem.space.num_blocks
        for each in (cache, reference):
            each.batch_repeat_interleave(3)
        assert model.tiered_mem.space.num_blocks == before
        nexts = torch.randint(2, 64, (3, 12))
        got = model(nexts, past_key_values=cache).logits
        want = stock(nexts, past_key_values=reference).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        for each in (cache, reference):
            each.batch_select_indices(torch.tensor([2, 0]))
        got = model(nexts[:2], past_key_values=cache).logits
        want = stock(nexts[:2], past_key_values=reference).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    cache.close()
    assert model.tiered_mem.space.num_blocks == 0


@pytest.mark.parametrize("removed", [1, 5, 6, 8, 13, 20, 21, 30])
def test_cropping(stock: PreTrainedModel, model: Any, removed: int) -> None:
    tokens = prompts()["input_ids"]
    cache = model.tiered_mem.cache()
    reference = DynamicCache(config=stock.config)
    with torch.no_grad():
        for m, each in ((model, cache), (stock, reference)):
            m(tokens, past_key_values=each)
            each.crop(-removed)
            assert each.get_seq_length() == max(0, 21 - removed)
        if removed > 21:
            return
        got = model(tokens[:, :9], past_key_values=cache).logits
        want = stock(tokens[:, :9], past_key_values=reference).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_mixture_of_experts_with_both_tiered() -> None:
    stock = tiered_mem.from_pretrained(MODEL, hbm="50%", dram=0, dtype="float32")
    model = tiered_mem.from_pretrained(
        MODEL, hbm="50%", dram=0, kv="256KiB", kv_dram="640KiB", dtype="float32"
    )
    tokens = torch.randint(3, 60, (2, 300), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert_same(ask(model, inputs), ask(stock, inputs))
    kv = model.tiered_mem.kv.stats()
    assert kv.num_nvme_reads > 0 and kv.num_dram_hits > 0
    model.tiered_mem.close()
    assert model.tiered_mem.kv.closed
    with pytest.raises(RuntimeClosedError):
        model.tiered_mem.cache()
    with pytest.raises(ConfigError, match="isn't tiered"):
        stock.tiered_mem.cache()
    stock.tiered_mem.close()


def test_a_dense_checkpoint(stock: PreTrainedModel, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path / "model")
    store = tmp_path / "nvme"
    model = tiered_mem.from_pretrained(tmp_path / "model", kv="64KiB", nvme=store)
    assert_same(ask(model, prompts()), ask(stock, prompts()))
    assert len(list(store.iterdir())) == 1
    model.tiered_mem.close()
    assert list(store.iterdir()) == []
    assert_same(ask(model, prompts()), ask(stock, prompts()))  # a stock model again
    with pytest.raises(NoExpertsError, match="kv="):
        tiered_mem.from_pretrained(tmp_path / "model")


def test_threads_have_caches_of_their_own(stock: PreTrainedModel, model: Any) -> None:
    want = stock.generate(**prompts(), max_new_tokens=20, do_sample=False)
    results: list[Any] = []

    def work() -> None:
        results.append(model.generate(**prompts(), max_new_tokens=20, do_sample=False))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(got, want) for got in results)


def test_other_caches_stay_possible(model: Any) -> None:
    inputs = prompts()
    own = ask(model, inputs, past_key_values=DynamicCache(config=model.config))
    assert type(own.past_key_values) is DynamicCache
    assert_same(ask(model, inputs, use_cache=False), own)
    assert model.tiered_mem.stats().num_events == 0
    assert_same(ask(model, inputs), own)


def test_options_from_wherever_generate_takes_them(model: Any) -> None:
    inputs = prompts()["input_ids"]
    for options in ({"use_cache": False}, {"cache_implementation": "dynamic"}):
        model.generate(inputs, GenerationConfig(max_new_tokens=3, do_sample=False, **options))
        assert model.tiered_mem.stats().num_events == 0
    model.generation_config.return_dict_in_generate = True
    model.generation_config.cache_implementation = "hybrid"  # the default, for transformers
    result = model.generate(inputs, GenerationConfig(max_new_tokens=3, do_sample=False))
    assert isinstance(result.past_key_values, TieredCache)
    assert model.tiered_mem.stats().num_events > 0


def test_a_cache_outlives_no_closing(model: Any) -> None:
    cache = model.tiered_mem.cache()
    with torch.no_grad():
        model(prompts()["input_ids"], past_key_values=cache)
    model.tiered_mem.close()
    with pytest.raises(RuntimeClosedError), torch.no_grad():
        model(prompts()["input_ids"], past_key_values=cache)
    cache.close()


def test_bad_input(stock: PreTrainedModel, model: Any, tmp_path: Path) -> None:
    fresh = copy.deepcopy(stock)
    with pytest.raises(AlreadyWrappedError):
        tiered_mem.tier_kv(model, "1MiB")
    for options, error, words in (
        ({"kv": "lots"}, ConfigError, "not a size"),
        ({"kv": "10%"}, ConfigError, "share of nothing"),
        ({"kv": 0}, BudgetError, "hbm"),
        ({"kv": BUDGET, "block_tokens": 0}, ConfigError, "at least one token"),
        ({"kv": BUDGET, "eviction": "magic"}, ConfigError, "magic"),
        ({"kv": BUDGET, "nvme": __file__}, ConfigError, "is a file"),
    ):
        with pytest.raises(error, match=words):
            tiered_mem.tier_kv(fresh, **options)  # type: ignore[arg-type]
    assert not hasattr(fresh, "tiered_mem")
    tiered_mem.tier_kv(fresh, 4096, block_tokens=64, nvme=tmp_path)
    with pytest.raises(BudgetError, match="a block of layer 0 has"):
        fresh.generate(**prompts())
    with pytest.raises(TieredMemError, match="pickled or copied"):
        copy.deepcopy(fresh)
    fresh.tiered_mem.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="kv_dram"):
        tiered_mem.from_pretrained(MODEL, kv_dram="1MiB")


def test_models_that_are_refused() -> None:
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="encoder"):
        tiered_mem.tier_kv(encoder, "1MiB")
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=8, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(UnsupportedModelError):
        tiered_mem.tier_kv(mamba, "1MiB")

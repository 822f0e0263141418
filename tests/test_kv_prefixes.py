"""Prefixes across restarts: the same tokens, the stored part not computed again, damage cut off."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import tiered_mem
from tiered_mem.errors import ConfigError, StoreBusyError, UnsupportedModelError
from tiered_mem.kv_payloads import KvPayloads
from tiered_mem.prefixes import PrefixStore
from tiered_mem.snapshot import pack_key

BLOCK_TOKENS = 8


def make(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stock() -> LlamaForCausalLM:
    return make()


@pytest.fixture
def start(stock: LlamaForCausalLM, tmp_path: Path) -> Callable[..., Any]:
    """Start over with a model whose prefixes are in one directory."""

    def starter(model: Any = None, **options: Any) -> Any:
        options = {"prefixes": tmp_path / "prefixes", "block_tokens": BLOCK_TOKENS, **options}
        return tiered_mem.tier_kv(model or copy.deepcopy(stock), "16KiB", **options)

    return starter


def tokens(num: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, 64, (1, num), generator=torch.Generator().manual_seed(seed))


def ask(model: Any, prompt: torch.Tensor, num: int = 20) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=num, do_sample=False)  # type: ignore[no-any-return]


def computed(model: Any) -> list[int]:
    """Return a list that gets the number of tokens of each forward."""
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[1])
    )
    return seen


def test_a_chat_goes_on_after_restarts(stock: LlamaForCausalLM, start: Callable[..., Any]) -> None:
    prompt = tokens(21)
    turns = [tokens(7, seed) for seed in (5, 6)]
    expected = ask(stock, prompt)
    model = start()
    got = ask(model, prompt)
    assert torch.equal(got, expected)
    model.tiered_mem.close()
    for turn in turns:  # each in a new process, as far as the model is concerned
        prompt = torch.cat([got, turn], 1)
        expected = ask(stock, prompt)
        model = start()
        seen = computed(model)
        got = ask(model, prompt)
        assert torch.equal(got, expected)
        stored = (prompt.shape[1] - turn.shape[1] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert seen[0] == prompt.shape[1] - stored  # only the tail
        assert model.tiered_mem.num_restored_tokens == stored
        model.tiered_mem.close()


@pytest.mark.parametrize("length", [1, 8, 16, 17])
def test_a_token_is_left_to_compute(
    stock: LlamaForCausalLM, start: Callable[..., Any], length: int
) -> None:
    model = start()
    for _ in range(2):
        prompt = tokens(length)
        assert torch.equal(ask(model, prompt), ask(stock, prompt))
    assert model.tiered_mem.num_restored_tokens == (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    model.tiered_mem.close()


def test_a_prompt_that_diverges_in_a_block(
    stock: LlamaForCausalLM, start: Callable[..., Any]
) -> None:
    prompt = tokens(40)
    model = start()
    ask(model, prompt)
    other = prompt.clone()
    other[0, 19] = 63 - other[0, 19] // 2
    assert torch.equal(ask(model, other), ask(stock, other))
    assert model.tiered_mem.num_restored_tokens == 16
    model.tiered_mem.close()


def test_another_model_finds_nothing(start: Callable[..., Any]) -> None:
    prompt = tokens(40)
    model = start()
    ask(model, prompt)
    model.tiered_mem.close()
    for other in (make(seed=1), make().to(torch.bfloat16)):
        plain = ask(copy.deepcopy(other), prompt)
        model = start(other)
        assert torch.equal(ask(model, prompt), plain)
        assert model.tiered_mem.num_restored_tokens == 0
        model.tiered_mem.close()


def flip(model: Any, prompt: torch.Tensor, group: int) -> None:
    """Flip a bit in a stored block, and close the model."""
    store = model.tiered_mem.prefixes._store
    records = store.match(prompt[0].numpy())
    with store.store.snapshot() as snapshot:
        offset = snapshot.extent(records[group].keys[1]).offset
    path = store.store.path / "payload.bin"
    model.tiered_mem.close()
    with open(path, "r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)[0]
        file.seek(offset + 100)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("group", [0, 2, 4])
def test_a_damaged_block_is_computed_again(
    stock: LlamaForCausalLM, start: Callable[..., Any], tmp_path: Path, group: int
) -> None:
    prompt = tokens(45)
    model = start()
    ask(model, prompt)
    flip(model, prompt, group)
    model = start()
    assert torch.equal(ask(model, prompt), ask(stock, prompt))
    assert model.tiered_mem.num_damaged > 0
    seen = computed(model)
    assert torch.equal(ask(model, prompt), ask(stock, prompt))  # whole again
    assert seen[0] == 45 - 40
    model.tiered_mem.close()
    with PrefixStore.inspect(tmp_path / "prefixes") as store:
        assert store.verify() == [] and not store.orphans


def test_the_store_stays_below_its_capacity(
    stock: LlamaForCausalLM, start: Callable[..., Any], tmp_path: Path
) -> None:
    capacity = 1 << 20
    model = start(prefixes_capacity=capacity)
    for seed in range(12):
        prompt = tokens(60, seed)
        assert torch.equal(ask(model, prompt), ask(stock, prompt))
    model.tiered_mem.close()
    assert (tmp_path / "prefixes" / "data.mdb").stat().st_size <= capacity


def test_what_caches_hold_keeps_no_room_from_others(
    stock: LlamaForCausalLM, start: Callable[..., Any]
) -> None:
    model = start(prefixes_capacity=2 << 20)
    base = tokens(64)
    ask(model, base, 8)
    kept = model.tiered_mem.cache(base[0])
    for seed in range(12):  # each evicts what others stored, but not what all start with
        prompt = torch.cat([base, tokens(200, seed)], 1)
        assert torch.equal(ask(model, prompt, 8), ask(stock, prompt, 8))
    with torch.no_grad():
        got = model(base[:, 56:], past_key_values=kept).logits
        want = model(base, use_cache=False).logits[:, 56:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    model.tiered_mem.close()


@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_catalogue_cuts_the_prefix(
    stock: LlamaForCausalLM, start: Callable[..., Any], tmp_path: Path, missing: bool
) -> None:
    prompt = tokens(45)
    model = start()
    ask(model, prompt)
    model.tiered_mem.flush()
    record = model.tiered_mem.prefixes._store.match(prompt[0].numpy())[2]
    model.tiered_mem.close()
    with lmdb.open(str(tmp_path / "prefixes"), max_dbs=3, map_size=1 << 30) as env:
        catalogue = env.open_db(b"catalogue")
        name = pack_key(record.keys[1])
        with env.begin(catalogue, write=True) as txn:
            entry = bytearray(txn.pop(name))
            entry[9] ^= 4
            if not missing:
                txn.put(name, bytes(entry))
    model = start()
    assert torch.equal(ask(model, prompt), ask(stock, prompt))
    assert model.tiered_mem.num_restored_tokens == 2 * BLOCK_TOKENS
    assert model.tiered_mem.num_damaged > 0
    model.tiered_mem.close()
    with PrefixStore.inspect(tmp_path / "prefixes") as store:
        assert store.verify() == [] and not store.orphans


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_starting_over_is_not_seen(stock: LlamaForCausalLM, start: Callable[..., Any]) -> None:
    prompt = tokens(45)
    model = start()
    ask(model, prompt)
    flip(model, prompt, 2)
    answers, streamers = [], [Streamer(), Streamer()]
    for each, streamer in zip((stock, start()), streamers, strict=True):
        torch.manual_seed(5)
        options = {"do_sample": True, "max_new_tokens": 20, "streamer": streamer}
        answers.append(each.generate(prompt, **options))
    assert each.tiered_mem.num_damaged > 0
    assert torch.equal(*answers)
    assert streamers[0].seen == streamers[1].seen
    each.tiered_mem.close()


def test_an_answer_that_cannot_be_stored_is_not_lost(
    stock: LlamaForCausalLM, start: Callable[..., Any]
) -> None:
    prompt = tokens(1500)
    model = start(prefixes_capacity=1 << 20)
    with pytest.warns(UserWarning, match=r"wasn't stored: .* no room"):
        got = ask(model, prompt, 5)
        model.tiered_mem.flush()
    assert torch.equal(got, ask(stock, prompt, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.tiered_mem.close()  # said once


def test_saving_by_hand(start: Callable[..., Any]) -> None:
    model = start()
    prompt = tokens(30)
    cache = model.tiered_mem.cache()
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    assert model.tiered_mem.save(cache, prompt[0]) == 24
    restored = model.tiered_mem.cache(prompt[0])
    assert restored.get_seq_length() == 24
    with torch.no_grad():
        got = model(prompt[:, 24:], past_key_values=restored).logits
        want = model(prompt, use_cache=False).logits[:, 24:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="29 token ids for a cache of 30"):
        model.tiered_mem.save(cache, prompt[0, :29])
    cache.batch_repeat_interleave(2)
    with pytest.raises(ConfigError, match="one sequence"):
        model.tiered_mem.save(cache, prompt[0])
    model.tiered_mem.close()


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}]
)
def test_other_ways_of_decoding_start_from_what_is_stored(
    stock: LlamaForCausalLM, start: Callable[..., Any], options: dict[str, int]
) -> None:
    prompt = tokens(40)
    model = start()
    ask(model, prompt, 5)
    want = stock.generate(prompt, max_new_tokens=20, do_sample=False, **options)
    got = model.generate(prompt, max_new_tokens=20, do_sample=False, **options)
    assert torch.equal(got, want)
    assert model.tiered_mem.num_restored_tokens == (32 if "num_beams" in options else 0)
    assert torch.equal(ask(model, got), ask(stock, got))  # nothing wrong was stored
    model.tiered_mem.close()


@pytest.mark.parametrize("budget", ["24KiB", "4MiB"])
def test_blocks_of_whole_pages_are_stored_from_where_they_lie(
    stock: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    lent: list[bool] = []
    lend = KvPayloads.lend

    def counted(self: KvPayloads, names: Any) -> Any:
        found = lend(self, names)
        lent.append(found is not None)
        return found

    monkeypatch.setattr(KvPayloads, "lend", counted)
    prompt = tokens(300)
    want = ask(stock, prompt, 80)
    for stored in (0, 288):  # a block of 32 tokens has 4096 bytes
        model = tiered_mem.tier_kv(
            copy.deepcopy(stock), budget, prefixes=tmp_path / "prefixes", block_tokens=32
        )
        assert torch.equal(ask(model, prompt, 80), want)
        assert model.tiered_mem.num_restored_tokens == stored
        model.tiered_mem.close()
    assert any(lent) or budget == "24KiB"
    with PrefixStore.inspect(tmp_path / "prefixes") as store:
        assert store.verify() == []


def test_what_ids_alone_do_not_decide_is_not_stored(
    stock: LlamaForCausalLM, start: Callable[..., Any]
) -> None:
    prompt = tokens(40)
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    model = start()
    for _ in range(2):
        got = model.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False)
        want = stock.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False)
        assert torch.equal(got, want)
        assert torch.equal(ask(model, prompt), ask(stock, prompt))
    embeds = model.get_input_embeddings()(prompt)
    model.generate(inputs_embeds=embeds, max_new_tokens=9)
    assert model.tiered_mem.num_restored_tokens == 32  # of the second plain prompt
    model.tiered_mem.close()


def test_bad_input(stock: LlamaForCausalLM, start: Callable[..., Any]) -> None:
    model = start()
    with pytest.raises(StoreBusyError):
        start()
    model.tiered_mem.close()
    plain = start(prefixes=None)
    with pytest.raises(ConfigError, match="prefixes=DIRECTORY"):
        plain.tiered_mem.save(plain.tiered_mem.cache(), tokens(3)[0])
    plain.tiered_mem.close()
    with pytest.raises(ConfigError, match="prefix_states is 0"):
        start(prefix_states=0)
    with pytest.raises(UnsupportedModelError, match="windows"):
        start(windowed(), prefix_states="none")


def windowed() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=13,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return Gemma2ForCausalLM(config).eval()


# Every 16 tokens, windows of 13 are all there is between: every block is an end.
@pytest.mark.parametrize(("states", "step"), [("full", 8), (16, 8), (40, 40)])
def test_windows_come_back(start: Callable[..., Any], states: str | int, step: int) -> None:
    stock, got = windowed(), tokens(45)
    for seed, most in ((5, 0), (6, 64), (7, 88)):
        prompt = torch.cat([got, tokens(7, seed)], 1)
        expected = ask(stock, prompt, 16)
        model = start(windowed(), prefix_states=states)
        got = ask(model, prompt, 16)
        assert torch.equal(got, expected)
        assert model.tiered_mem.num_restored_tokens == most // step * step
        model.tiered_mem.close()


def test_a_missing_window_cuts_the_prefix(start: Callable[..., Any]) -> None:
    prompt = tokens(45)
    model = start(windowed())
    ask(model, prompt, 5)
    model.tiered_mem.flush()
    prefixes = model.tiered_mem.prefixes
    records = prefixes._store.match(prompt[0].numpy())
    (window, *_) = prefixes.states.windows
    bare = dataclasses.replace(records[3], layers=tuple(set(records[3].layers) - {window}))
    prefixes._store.index.records[bare.hash] = bare
    assert torch.equal(ask(model, prompt), ask(windowed(), prompt))
    # The windows of ends 4 and 5 need group 3; that of end 3 doesn't.
    assert model.tiered_mem.num_restored_tokens == 24
    model.tiered_mem.close()

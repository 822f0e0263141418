"""Attention over blocks: exact, whatever the pieces; and whole keys for whoever else asks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface

from tiered_mem.errors import ConfigError
from tiered_mem.hf import kv_attention
from tiered_mem.hf.kv_attention import LazyStates, Piece, attention_over_sdpa


class Pieces:
    """Keys and values cut into pieces, in a shuffled order."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, size: int, seed: int, per_row: bool
    ) -> None:
        self.keys, self.values = keys, values
        self.num_tokens = keys.shape[-2]
        self.size, self.seed, self.per_row = size, seed, per_row
        self.num_gathered = self.num_finished = 0

    def whole(self) -> None:
        return None

    def batches(self, wanted: torch.Tensor | None = None) -> Iterator[list[Piece]]:
        rows = [None] if not self.per_row else [[i] for i in range(self.keys.shape[0])]
        starts = range(0, self.num_tokens, self.size)
        all_pieces = [(start, row) for start in starts for row in rows]
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(all_pieces), generator=generator).tolist()
        for i in range(0, len(order), 3):
            batch = []
            for start, row in (all_pieces[j] for j in order[i : i + 3]):
                chosen = slice(None) if row is None else row
                span = slice(start, start + self.size)
                keys, values = self.keys[chosen, :, span], self.values[chosen, :, span]
                batch.append(Piece(start, None if row is None else torch.tensor(row), keys, values))
            yield batch
        self.num_finished += 1

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_gathered += 1
        return self.keys, self.values

    def finish(self) -> None:
        self.num_finished += 1


def lazy(source: Pieces) -> tuple[LazyStates, LazyStates]:
    return (
        LazyStates(source, source.keys, is_keys=True),
        LazyStates(source, source.values, is_keys=False),
    )


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Attention as textbooks write it, in float64: [batch, queries, heads, dim]."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = torch.nan_to_num(torch.softmax(scores.masked_fill(~mask, -torch.inf), -1))
    return (weights @ values).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 5),
    past=st.integers(0, 40),
    size=st.integers(1, 9),
    padding=st.integers(0, 6),
    per_row=st.booleans(),
    additive=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_is_attention(
    batch: int,
    kv_heads: int,
    groups: int,
    queries: int,
    past: int,
    size: int,
    padding: int,
    per_row: bool,
    additive: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tokens = past + queries
    heads = kv_heads * groups
    query = torch.randn(batch, heads, queries, 8)
    keys, values = torch.randn(batch, kv_heads, tokens, 8), torch.randn(batch, kv_heads, tokens, 6)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[past:].repeat(batch, 1, 1, 1)
    mask[-1, ..., : min(padding, tokens)] = False  # rows that see nothing at all among them
    module = SimpleNamespace(is_causal=True, training=False)
    source = Pieces(keys, values, size, seed, per_row)
    given_mask = torch.where(mask, 0.0, -torch.inf) if additive else mask
    got, _ = attention_over_sdpa(module, query, *lazy(source), given_mask)  # type: ignore[arg-type]
    want = reference(query, keys, values, mask)
    assert got.shape == (batch, queries, heads, 6)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    assert source.num_gathered == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 1, 16, dtype=dtype)
    keys, values = torch.randn(2, 1, 2, 500, 16, dtype=dtype)
    module = SimpleNamespace(is_causal=True, training=False)
    got, _ = attention_over_sdpa(
        module,
        query,
        *lazy(Pieces(keys, values, 7, 0, False)),
        None,  # type: ignore[arg-type]
    )
    want = reference(query, keys, values, torch.ones(1, 500, dtype=torch.bool))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want.to(dtype).double(), atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("past", [0, 700])
def test_many_queries_and_long_pieces_are_cut(monkeypatch: pytest.MonkeyPatch, past: int) -> None:
    monkeypatch.setattr(kv_attention, "_MOST_SCORES", 1 << 12)
    monkeypatch.setattr(kv_attention, "_MOST_TOKENS", 64)
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 4, 90, 8), *torch.randn(2, 1, 2, past + 90, 8)
    mask = torch.ones(past + 90, past + 90, dtype=torch.bool).tril()[past:][None, None]
    module = SimpleNamespace(is_causal=True, training=False)
    for given_mask in (mask, None):
        source = Pieces(keys, values, 500, 0, False)
        got, _ = attention_over_sdpa(module, query, *lazy(source), given_mask)  # type: ignore[arg-type]
        torch.testing.assert_close(
            got.double(), reference(query, keys, values, mask), atol=2e-6, rtol=1e-5
        )


def test_training_is_refused() -> None:
    query, keys, values = torch.randn(3, 1, 2, 6, 8)
    module = SimpleNamespace(is_causal=True, training=True)
    with pytest.raises(ConfigError, match="eval"):
        attention_over_sdpa(
            module,  # type: ignore[arg-type]
            query,
            *lazy(Pieces(keys, values, 4, 0, False)),
            None,
            dropout=0.1,
        )


def test_without_a_mask_it_is_causal() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 1, 2, 6, 8)
    module = SimpleNamespace(is_causal=True, training=False)
    got, _ = attention_over_sdpa(
        module,
        query,
        *lazy(Pieces(keys, values, 4, 0, False)),
        None,  # type: ignore[arg-type]
    )
    want = reference(query, keys, values, torch.ones(6, 6, dtype=torch.bool).tril())
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_anything_else_gets_them_whole() -> None:
    keys, values = torch.randn(2, 2, 3, 10, 4)
    source = Pieces(keys, values, 4, 0, False)
    lazy_keys, lazy_values = lazy(source)
    assert lazy_keys.shape == keys.shape
    assert (lazy_keys.dtype, lazy_keys.device, lazy_keys.dim()) == (keys.dtype, keys.device, 4)
    assert "10" in repr(lazy_keys)
    assert source.num_gathered == 0
    for result, wanted in (
        (lazy_keys + 1, keys + 1),
        (torch.cat([lazy_keys, lazy_values], -1), torch.cat([keys, values], -1)),
        (lazy_values[:, :, 3:5], values[:, :, 3:5]),
        (lazy_keys.transpose(1, 2).reshape(2, 10, -1), keys.transpose(1, 2).reshape(2, 10, -1)),
    ):
        assert type(result) is torch.Tensor
        assert torch.equal(result, wanted)
    assert source.num_gathered == 5


def test_the_names_are_registered() -> None:
    for name in ("tiered_sdpa", "tiered_eager"):
        assert name in AttentionInterface().valid_keys()
        assert name in AttentionMaskInterface().valid_keys()

"""Attention over blocks of keys and values as they arrive, merged exactly.

Softmax over pieces: each gives its maximum, its sum and its weighted values, and these merge in any
order (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", 2022). So a context needs memory for a few blocks, not for all of it.

`TieredLayer.update` returns `LazyStates` in place of all keys and values. Our attention reads their
blocks; anything else that touches them gets them whole, so no model can be wrong by what it does.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from tiered_mem.callers import stacklevel
from tiered_mem.errors import ConfigError, UnsupportedModelError

_MOST_SCORES = 1 << 23  # elements of scores at a time: 32 MiB
_MOST_TOKENS = 1024  # of a piece at a time
_SMALL_TOKENS = 32
_PREFIX = "tiered_"


class Piece(NamedTuple):
    """Tokens that lie together. Views: good until the next step of what yields them.

    `keys` [rows or 1, kv_heads, tokens, key_dim] and `values` belong to `rows` of the batch (None:
    all, in order), from token `start` on; one row of them may stand for several of the batch.
    """

    start: int
    rows: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor


class Blocks(Protocol):
    """All keys and values of a layer, wherever they lie."""

    num_tokens: int

    def whole(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return keys and values if all of them are in one place, else None."""

    def batches(self, wanted: torch.Tensor | None = None) -> Iterator[list[Piece]]:
        """Yield each token once, in pieces that became ready together.

        `wanted`: bool [batch or 1, tokens] on the host, the tokens that some query sees; others
        may be left out. None: all.
        """

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values whole: [batch, kv_heads, tokens, dim]."""

    def finish(self) -> None:
        """What `whole` returned has been used."""


@runtime_checkable
class Choosing(Protocol):
    """Blocks that read less than a mask lets a query see. An approximation, so asked for."""

    choose: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor | None]
    """(scaled query, wanted) -> wanted: see `Blocks.batches`."""


class LazyStates(torch.Tensor):
    """Stands for all keys (or values) of a layer: [batch, kv_heads, tokens, dim], without memory.

    Any operation of torch's makes them whole and goes on with an ordinary tensor.
    """

    source: Blocks
    is_keys: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: Blocks, like: torch.Tensor, *, is_keys: bool) -> LazyStates:
        """`like`: a tensor of the same shape but for the number of tokens."""
        shape = (*like.shape[:-2], source.num_tokens, like.shape[-1])
        lazy: LazyStates = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        lazy.source, lazy.is_keys = source, is_keys
        return lazy

    def whole(self) -> torch.Tensor:
        return self.source.gather()[0 if self.is_keys else 1]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyStates(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyStates, LazyStates.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def use_tiered_attention(model: PreTrainedModel) -> str | None:
    """Let a model attend over blocks; return the name of the attention that it had.

    Layers whose cache isn't tiered go on with that one. Returns None, with a warning, for a model
    whose attention can't be replaced: it works, but each layer's keys and values are put together
    for every step. Raises `UnsupportedModelError` if it attends neither by sdpa nor by eager.
    """
    stock = model.config._attn_implementation
    if stock not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"the model attends by {stock!r}, whose masks blocks can't be cut from: load it with "
            "attn_implementation='sdpa'"
        )
    if not can_be_replaced(type(model)):
        warnings.warn(
            f"{type(model).__name__} doesn't let its attention be replaced: each layer's keys and "
            "values are put together in memory at every step, one layer at a time",
            stacklevel=stacklevel(),
        )
        return None
    model.set_attn_implementation(_PREFIX + stock)
    return str(stock)


# What a model does by the name of its attention, it wouldn't do by ours.
_ASKS_FOR_NAME = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b)")


# But this: attention of another name is handed the indices of the tokens that an indexer chose.
_HANDS_INDICES = re.compile(r'_attn_implementation in \("eager", "sdpa"\)')


def can_be_replaced(model_class: type[PreTrainedModel]) -> bool:
    if not model_class._can_set_attn_implementation():
        return False
    source = inspect.getsource(sys.modules[model_class.__module__])
    if "indices=sparse_indices" in source:
        source = _HANDS_INDICES.sub("", source)
    return _ASKS_FOR_NAME.search(source) is None


def _show_chosen(mask: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Hide from a mask [batch, 1, queries, tokens] all but the tokens that an indexer chose.

    `indices` [batch, queries, chosen] are taken out of `kwargs`.
    """
    indices = kwargs.pop("indices", None)
    if indices is None or mask is None:
        return mask
    hidden = torch.ones_like(mask[:, 0], dtype=torch.bool).expand(len(indices), -1, -1)
    hidden = hidden.scatter(-1, indices.long(), False)[:, None]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def attention_over_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """What `sdpa` computes, over blocks where `key` stands for them.

    Shapes as transformers' attention interface has them: query [batch, heads, queries, key_dim];
    returns [batch, queries, heads, value_dim] and None.
    """
    plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    attention_mask = _show_chosen(attention_mask, kwargs)

    def masks(num_tokens: int) -> torch.Tensor | None:
        if attention_mask is not None:
            return attention_mask
        return _causal(module, query, num_tokens, kwargs.get("is_causal"))

    stock = partial(sdpa_attention_forward, module, query, attention_mask=attention_mask, **kwargs)
    return _attend(stock, query, key, value, masks, kwargs, plain=plain)


def attention_over_eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """What the model's own eager attention computes: see `attention_over_sdpa`."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention_mask = _show_chosen(attention_mask, kwargs)
    stock = partial(eager, module, query, attention_mask=attention_mask, **kwargs)
    sinks = getattr(module, "sinks", None)
    return _attend(
        stock,
        query,
        key,
        value,
        lambda _: attention_mask,
        kwargs,
        plain=_is_plain(eager),
        sinks=sinks,
    )


AttentionInterface.register("tiered_sdpa", attention_over_sdpa)
AttentionInterface.register("tiered_eager", attention_over_eager)
AttentionMaskInterface.register("tiered_sdpa", sdpa_mask)
AttentionMaskInterface.register("tiered_eager", eager_mask)

_KNOWN = {
    *("module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap"),
    "kwargs",
}


@cache
def _is_plain(eager: Callable[..., Any]) -> bool:
    """Whether an eager attention is the usual one, but for a soft cap and sinks."""
    return set(inspect.signature(eager).parameters) <= _KNOWN


def _attend(
    stock: Callable[..., tuple[torch.Tensor, Any]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: Callable[[int], torch.Tensor | None],
    kwargs: dict[str, Any],
    *,
    plain: bool,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """Attend by `stock`, given keys and values, or block by block where that is the same.

    `masks` gives the mask for so many tokens, `plain` tells that `stock` does the usual.
    """
    if not (
        isinstance(key, LazyStates)
        and isinstance(value, LazyStates)
        and (key.source, key.is_keys, value.is_keys) == (value.source, True, False)
    ):  # not from a tiered cache, or made into something else since
        return stock(key=_plain(key), value=_plain(value))
    source = key.source
    together = source.whole()
    if together is None and not plain:
        together = source.gather()
    if together is not None:
        result = stock(key=together[0], value=together[1])
        source.finish()
        return result
    if kwargs.get("dropout"):  # models say 0 unless they train
        raise ConfigError("attention over blocks is for inference: call model.eval() first")
    scaling, mask = kwargs.get("scaling"), masks(source.num_tokens)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    spans = [
        _Attention(
            query[:, :, span],
            value.shape[-1],
            scaling,
            mask if mask is None or mask.shape[-2] == 1 else mask[:, :, span],
            key.shape[1],
            kwargs.get("softcap"),
        )
        for span in _spans(query)
    ]
    wanted = _wanted(mask, source.num_tokens)
    if isinstance(source, Choosing):
        wanted = source.choose(query * scaling, wanted)
    for pieces in source.batches(wanted):
        for part in spans:
            part.add(pieces)
    return torch.cat([part.result(sinks) for part in spans], 1), None


def _wanted(mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    """Return which tokens any query sees, [batch or 1, tokens] on the host; None if all are needed.

    All are for a query that sees none: a model's own attention gives such padding the mean of them.
    """
    if mask is None or mask.shape[-1] != num_tokens:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    wanted = seen.any(1).any(1)
    if bool(wanted.all()) or not bool(seen.any(-1).all()):
        return None
    return wanted.cpu()


def _spans(query: torch.Tensor) -> list[slice]:
    """Cut the queries so that their scores for one piece are few."""
    batch, heads, num_queries, _ = query.shape
    most = max(1, _MOST_SCORES // (batch * heads * _MOST_TOKENS))
    return [slice(i, min(i + most, num_queries)) for i in range(0, num_queries, most)]


def _plain(states: torch.Tensor) -> torch.Tensor:
    return states.whole() if isinstance(states, LazyStates) else states


def _causal(
    module: torch.nn.Module, query: torch.Tensor, num_tokens: int, is_causal: bool | None
) -> torch.Tensor | None:
    """Return the mask [1, 1, queries, tokens] that sdpa does without; None if all see all."""
    num_queries = query.shape[-2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if num_queries == 1 or not causal:
        return None
    tokens = torch.arange(num_tokens, device=query.device)
    queries = torch.arange(num_queries, device=query.device) + num_tokens - num_queries
    return (tokens <= queries[:, None])[None, None]


class _Attention:
    """The running softmax of all queries: maximum, sum, and weighted values, in float32.

    Heads that share keys lie together with their queries: [batch, kv_heads, group * queries, ...].
    """

    def __init__(
        self,
        query: torch.Tensor,
        value_dim: int,
        scaling: float,
        mask: torch.Tensor | None,
        num_kv_heads: int,
        softcap: float | None,
    ) -> None:
        self._dtype = query.dtype
        self._batch, self._heads, self._queries, _ = query.shape
        # The CPU has no faster products in smaller types; a GPU has, with float32 sums.
        wide = torch.float32 if query.device.type == "cpu" else query.dtype
        self._query = (query.detach().to(wide) * scaling).reshape(
            self._batch, num_kv_heads, -1, query.shape[-1]
        )
        self._mask, self._softcap = mask, softcap
        shape = self._query.shape[:-1]
        self._max = query.new_full((*shape, 1), -torch.inf, dtype=torch.float32)
        self._sum = query.new_zeros((*shape, 1), dtype=torch.float32)
        self._values = query.new_zeros((*shape, value_dim), dtype=torch.float32)

    def add(self, pieces: list[Piece]) -> None:
        """Take the pieces in, those of one size together, a few scores at a time."""
        alike: dict[tuple[Any, ...], list[Piece]] = {}
        for piece in _cut(pieces):
            rows = None if piece.rows is None else tuple(piece.rows.tolist())
            alike.setdefault((rows, piece.keys.shape), []).append(piece)
        for (rows, shape), group in alike.items():
            most = max(1, _MOST_SCORES // (self._query[..., 0].numel() * shape[-2]))
            for i in range(0, len(group), most):
                self._add_run(rows, group[i : i + most])

    def _add_run(self, rows: tuple[int, ...] | None, pieces: list[Piece]) -> None:
        chosen = slice(None) if rows is None else list(rows)
        num_rows = self._batch if rows is None else len(rows)
        fold = _Fold(num_rows, pieces[0].keys.shape[1], shared=pieces[0].keys.shape[0] == 1)
        scores = _scores(fold(self._query[chosen]), [piece.keys.flatten(0, 1) for piece in pieces])
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        if self._mask is not None:
            self._hide(fold.apart(scores), self._mask, chosen, pieces)

        before = fold(self._max[chosen])
        top = torch.maximum(before, scores.amax((0, 3)).unsqueeze(-1))
        finite = top.masked_fill(top == -torch.inf, 0)  # of queries that saw nothing yet
        weights = scores.sub_(finite).exp_()
        keep = (before - finite).exp()
        sums = fold(self._sum[chosen]) * keep + weights.sum((0, 3)).unsqueeze(-1)
        values = fold(self._values[chosen]) * keep
        _add_weighted(values, weights, [piece.values.flatten(0, 1) for piece in pieces])
        self._max[chosen] = fold.back(top)
        self._sum[chosen] = fold.back(sums)
        self._values[chosen] = fold.back(values)

    def _hide(
        self, scores: torch.Tensor, mask: torch.Tensor, chosen: Any, pieces: list[Piece]
    ) -> None:
        """Mask scores [pieces, rows, kv_heads, group * queries, tokens] where they lie."""
        mask = mask if mask.shape[0] == 1 else mask[chosen]
        num_tokens = scores.shape[-1]
        mask = torch.stack([mask[..., p.start : p.start + num_tokens] for p in pieces])
        heads = (1, 1) if mask.shape[2] == 1 else (scores.shape[2], -1)
        mask = torch.unflatten(mask, 2, heads)
        apart = torch.unflatten(scores, 3, (-1, self._queries))
        if mask.dtype == torch.bool:
            apart.masked_fill_(~mask, -torch.inf)
        else:
            apart.add_(mask)

    def result(self, sinks: torch.Tensor | None) -> torch.Tensor:
        """Return the output. `sinks` [heads]: what each head may attend to instead of any token."""
        if sinks is not None:
            group = self._query.shape[-2] // self._queries
            sink = sinks.float().view(1, -1, group, 1).expand(-1, -1, -1, self._queries)
            sink = sink.reshape(1, self._query.shape[1], -1, 1)
            top = torch.maximum(self._max, sink)
            keep = (self._max - top).exp()
            self._sum = self._sum * keep + (sink - top).exp()
            self._values = self._values * keep
        output = self._values / self._sum.masked_fill(self._sum == 0, 1)
        output = output.view(self._batch, self._heads, self._queries, -1)
        return output.to(self._dtype).transpose(1, 2).contiguous()


class _Fold(NamedTuple):
    """Rows, heads and queries of a batch as matrices [matrices, rows of one, ...] of a product.

    Queries of all rows that share their keys are of one matrix, so that keys aren't repeated.
    """

    num_rows: int
    num_heads: int
    shared: bool

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Fold [rows, kv_heads, queries, dim]."""
        if not self.shared:
            return states.flatten(0, 1)
        return states.transpose(0, 1).flatten(1, 2)

    def back(self, states: torch.Tensor) -> torch.Tensor:
        if not self.shared:
            return torch.unflatten(states, 0, (self.num_rows, -1))
        return torch.unflatten(states, 1, (self.num_rows, -1)).transpose(0, 1)

    def apart(self, scores: torch.Tensor) -> torch.Tensor:
        """View scores [pieces, *folded, tokens] as [pieces, rows, kv_heads, queries, tokens]."""
        if not self.shared:
            return torch.unflatten(scores, 1, (self.num_rows, -1))
        return torch.unflatten(scores, 2, (self.num_rows, -1)).transpose(1, 2)


def _scores(query: torch.Tensor, keys: list[torch.Tensor]) -> torch.Tensor:
    """Return float32 [pieces, matrices, queries, tokens], of keys [matrices, tokens, dim]."""
    if query.device.type != "cpu" or _are_small(keys):  # few large products
        stacked = torch.stack(keys).to(query.dtype)
        return (query @ stacked.transpose(-1, -2)).float()
    # A copy of the keys would cost more than a product of its own for each piece.
    scores = query.new_empty(len(keys), *query.shape[:-1], keys[0].shape[-2])
    for out, piece in zip(scores.unbind(), _widened(keys, query.dtype), strict=True):
        torch.bmm(query, piece.mT, out=out)
    return scores


def _add_weighted(sums: torch.Tensor, weights: torch.Tensor, values: list[torch.Tensor]) -> None:
    """Add weights [pieces, matrices, queries, tokens] @ values to float32 sums, in place."""
    if sums.device.type != "cpu" or _are_small(values):
        stacked = torch.stack(values)
        if sums.device.type == "cpu":  # which has no faster products in smaller types
            stacked = stacked.to(sums.dtype)
        sums += (weights.to(stacked.dtype) @ stacked).sum(0, dtype=torch.float32)
        return
    for part, piece in zip(weights.unbind(), _widened(values, sums.dtype), strict=True):
        sums.baddbmm_(part, piece)


def _are_small(pieces: list[torch.Tensor]) -> bool:
    """Whether a copy of the pieces costs less than a product of its own for each."""
    return len(pieces) > 1 and pieces[0].shape[-2] <= _SMALL_TOKENS


def _widened(pieces: list[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the pieces as `dtype`, one at a time: they are read from the cache then."""
    return (piece if piece.dtype == dtype else piece.to(dtype) for piece in pieces)


def _cut(pieces: list[Piece]) -> Iterator[Piece]:
    """Yield the pieces in pieces of at most `_MOST_TOKENS` tokens."""
    for piece in pieces:
        if piece.keys.shape[-2] <= _MOST_TOKENS:
            yield piece
            continue
        for i in range(0, piece.keys.shape[-2], _MOST_TOKENS):
            span = slice(i, i + _MOST_TOKENS)
            keys, values = piece.keys[..., span, :], piece.values[..., span, :]
            yield Piece(piece.start + i, piece.rows, keys, values)

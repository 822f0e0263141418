"""Attention that reads only the blocks whose keys may match the query, by bounds kept of them.

After Quest (Tang et al., "Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML
2024). For each sealed block and head, device memory holds the smallest and largest of every element
of its keys; with a query they bound its score with any key of the block. That is an approximation:
what the unread blocks would have added to attention is left out. `benchmarks/bench_quest.py`
measures what it costs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from tiered_mem.errors import ConfigError, UnsupportedModelError
from tiered_mem.hf.kv_attention import can_be_replaced
from tiered_mem.hf.kv_cache import TieredCache, TieredLayer, View


class QuestCache(TieredCache):
    """A `TieredCache` whose full-attention layers read about `num_tokens` tokens a step."""

    def __init__(self, num_tokens: int, *args: Any) -> None:
        super().__init__(*args)
        for layer in self.tiered_layers():
            if isinstance(layer, QuestLayer):
                layer.num_chosen = num_tokens // layer.block_tokens

    @staticmethod
    def tiered_class(stock: type) -> type[TieredLayer] | None:
        return QuestLayer if stock is DynamicLayer else TieredCache.tiered_class(stock)


def check(model: PreTrainedModel, num_tokens: int, block_tokens: int) -> None:
    """Raise `ConfigError` for fewer tokens than three blocks have, and `UnsupportedModelError` for
    a model whose keys aren't in its cache, or whose attention can't be replaced."""
    if not isinstance(num_tokens, int) or num_tokens < 3 * block_tokens:
        raise ConfigError(
            f"quest_tokens is {num_tokens}: with block_tokens={block_tokens} it is at least "
            f"{3 * block_tokens}, for the first block, the last and one that is chosen"
        )
    latent = any(hasattr(module, "expand_kv") for module in model.modules())
    if latent or not can_be_replaced(type(model)):
        reason = "keeps latents, not keys" if latent else "attends by code of its own"
        raise UnsupportedModelError(
            f"{type(model).__name__} {reason}: no block of it can be chosen by its keys; leave "
            "quest_tokens out"
        )


class QuestLayer(TieredLayer):
    """A layer that knows bounds of the keys of its sealed blocks."""

    num_chosen = 0  # blocks that a query reads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of each block: [2 (smallest, largest), batch, kv_heads, blocks, dim].
        self._bounds: torch.Tensor | None = None

    def view(self) -> View:
        return _QuestView(self)

    def seal(self) -> None:
        num_full = self.num_tail // self.block_tokens
        if num_full == 0:
            return
        full = self.keys[..., : num_full * self.block_tokens, :]
        blocks = torch.unflatten(full, 2, (num_full, self.block_tokens))
        bounds = torch.stack([blocks.amin(3), blocks.amax(3)])
        super().seal()
        self._bounds = bounds if self._bounds is None else torch.cat([self._bounds, bounds], 3)

    def choose(self, query: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor | None:
        """Return which of the wanted tokens to read: bool [batch, tokens] on the host; None: all.

        `query` [batch, heads, queries, dim], scaled. Each query head has a share of its softmax
        for every block, as if all its keys were at the bound; a block counts by its largest share,
        since it holds all heads. Prompts read everything, and every query the first block, the
        last, and the tail.
        """
        num_blocks = len(self.rows[0])
        if query.shape[2] > 1 or num_blocks <= self.num_chosen or self._bounds is None:
            return wanted
        smallest, largest = self._bounds.unbind()
        folded = torch.unflatten(query.to(smallest.dtype), 1, (smallest.shape[1], -1)).squeeze(3)
        scores = folded.clamp(min=0) @ largest.mT + folded.clamp(max=0) @ smallest.mT
        if wanted is not None:
            sealed = torch.unflatten(wanted[:, : self.num_sealed], 1, (num_blocks, -1))
            unseen = ~sealed.any(2).to(scores.device)
            scores = scores.masked_fill(unseen[:, None, None], torch.finfo(scores.dtype).min)
        shares = scores.float().softmax(-1).amax((1, 2))  # [batch, blocks]
        shares[:, [0, -1]] = 2
        best = shares.topk(self.num_chosen, -1).indices.cpu()
        groups = torch.zeros(len(best), num_blocks, dtype=torch.bool).scatter_(1, best, True)
        chosen = torch.ones(len(best), self.get_seq_length(), dtype=torch.bool)
        chosen[:, : self.num_sealed] = groups.repeat_interleave(self.block_tokens, 1)
        return chosen if wanted is None else chosen & wanted

    def reset(self) -> None:
        super().reset()
        self._bounds = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self._bounds is not None:
            self._bounds = self._bounds[..., : len(self.rows[0]), :]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self._bounds is not None:
            self._bounds = self._bounds[:, indices.to(self._bounds.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._bounds is not None:
            self._bounds = self._bounds.repeat_interleave(repeats, dim=1)


class _QuestView(View):
    """`tiered_mem.hf.kv_attention.Choosing`."""

    def __init__(self, layer: QuestLayer) -> None:
        super().__init__(layer)
        self.choose = layer.choose

"""Latent attention (MLA, DeepSeek-V2, 2024) over blocks of latents, expanded as they come.

Such a model caches one latent and one rotated key a token, and makes keys and values for all heads
of all tokens by `expand_kv` in each step. Over a tiered cache, blocks hold the latents, and what
arrives is expanded, a few blocks at a time: only what the mask shows is read or expanded at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from tiered_mem.hf.kv_attention import Blocks, LazyStates, Piece
from tiered_mem.hf.overrides import Overrides

# (latents [batch, 1, tokens, rank], rotated keys) -> (keys [batch, heads, tokens, dim], values)
Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def expand_lazily(model: PreTrainedModel) -> list[Overrides]:
    """Have each `expand_kv` of a model expand lazy latents lazily; return what undoes it."""
    done = []
    for module in model.modules():
        expand = getattr(module, "expand_kv", None)
        if callable(expand):
            overrides = Overrides(module)
            overrides.set("expand_kv", _lazy(expand))
            done.append(overrides)
    return done


def _lazy(expand: Expand) -> Expand:
    def expand_kv(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
        if not (
            isinstance(kv_nope, LazyStates)
            and isinstance(k_rot, LazyStates)
            and (kv_nope.source, kv_nope.is_keys, k_rot.is_keys) == (k_rot.source, True, False)
        ):
            return expand(kv_nope, k_rot)
        source = ExpandedBlocks(kv_nope.source, expand)
        # One token tells the shapes, whatever the model does.
        one = [
            torch.zeros(*t.shape[:2], 1, t.shape[3], dtype=t.dtype, device=t.device)
            for t in (kv_nope, k_rot)
        ]
        keys, values = expand(*one)
        return LazyStates(source, keys, is_keys=True), LazyStates(source, values, is_keys=False)

    return expand_kv


class ExpandedBlocks:
    """The keys and values that a source's latents stand for: `kv_attention.Blocks`."""

    def __init__(self, source: Blocks, expand: Expand) -> None:
        self.num_tokens = source.num_tokens
        self._source, self._expand = source, expand

    def whole(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        together = self._source.whole()
        return None if together is None else self._expand(*together)

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._expand(*self._source.gather())

    def finish(self) -> None:
        self._source.finish()

    def batches(self, wanted: torch.Tensor | None = None) -> Iterator[list[Piece]]:
        for pieces in self._source.batches(wanted):
            # One product for all pieces of a size: they are many and small.
            for _, alike in groupby(pieces, key=lambda piece: piece.keys.shape):
                yield self._expanded(list(alike))

    def _expanded(self, pieces: list[Piece]) -> list[Piece]:
        rows = pieces[0].keys.shape[0]
        keys, values = self._expand(
            torch.cat([piece.keys for piece in pieces]),
            torch.cat([piece.values for piece in pieces]),
        )
        return [
            Piece(piece.start, piece.rows, *each)
            for piece, *each in zip(
                pieces, torch.split(keys, rows), torch.split(values, rows), strict=True
            )
        ]

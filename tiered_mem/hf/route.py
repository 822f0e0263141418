"""What a predictor is told of a transformers model and of its routers' decisions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tiered_mem.policies.prefetch import ModelInfo


def model_info(config: Any, num_experts: int) -> ModelInfo:
    """Return the facts of the model of this config. Its name is the last part of its origin's.

    A model that was made in memory goes by its type.
    """
    path = str(getattr(config, "name_or_path", "") or "")
    name = path.rstrip("/").rpartition("/")[2] or str(config.model_type)
    hidden_size = getattr(config.get_text_config(), "hidden_size", 0)
    return ModelInfo(name, num_experts, hidden_size if isinstance(hidden_size, int) else 0)


class RouterRoute:
    """One router's decision, a `tiered_mem.policies.prefetch.Route`.

    Args:
        layer, next_layer: whose router has spoken, and the one to predict.
        num_experts: of the two.
        hidden_size: of the model, 0 if unknown.
        top_k_index: [tokens, k].
        stream: the residual stream that the router saw, [..., hidden] with its tokens in the same
            order, perhaps with several streams a token; None if it isn't known.
        look_ahead: ranks the next layer's experts by its gate.
        last: the `last_state` of the stream, where it has been copied out already.
    """

    def __init__(
        self,
        layer: int,
        next_layer: int,
        num_experts: tuple[int, int],
        hidden_size: int,
        top_k_index: torch.Tensor,
        residual: torch.Tensor | None,
        look_ahead: Callable[[], Sequence[int]],
        last: torch.Tensor | None = None,
    ) -> None:
        self.layer, self.next_layer = layer, next_layer
        self.stream = threading.get_ident()
        self._num_experts_here, self.num_experts = num_experts
        self.top_k: int = top_k_index.shape[-1]
        self._hidden_size = hidden_size
        self._top_k_index, self._residual, self._look_ahead = top_k_index, residual, look_ahead
        self._last = last
        self._ahead: Sequence[int] | None = None

    def experts(self) -> Sequence[int]:
        ids = self._top_k_index
        ranked = (
            list(dict.fromkeys(ids.tolist()[0]))
            if ids.shape[0] == 1
            else rank_by_weight(ids, torch.ones_like(ids))
        )
        if max(ranked, default=0) < self._num_experts_here:
            return ranked
        return [index for index in ranked if index < self._num_experts_here]  # no sentinels

    def look_ahead(self) -> Sequence[int]:
        if self._ahead is None:
            self._ahead = self._look_ahead()
        return self._ahead

    def residual(self) -> npt.NDArray[np.float32] | None:
        """Of several streams a token it is their mean."""
        last = self._last
        if last is None and self._residual is not None:
            last = last_state(self._residual, self._top_k_index.shape[0], self._hidden_size)
        if last is None:
            return None
        copied: npt.NDArray[np.float32] = last.to("cpu", copy=True).numpy()
        return copied


def last_state(stream: torch.Tensor, num_tokens: int, hidden_size: int) -> torch.Tensor | None:
    """Return the last token's state, float32 [hidden] (of several streams their mean), or None.

    None where `stream` isn't one of so many tokens and so wide.
    """
    if not hidden_size or stream.numel() % (num_tokens * hidden_size):
        return None
    last = stream.detach().reshape(num_tokens, -1, hidden_size)[-1]
    return (last[0] if last.shape[0] == 1 else last.mean(0)).float()


def rank_by_weight(ids: torch.Tensor, weights: torch.Tensor) -> list[int]:
    """Distinct ids, those with the most weight over all tokens first."""
    if ids.shape[0] == 1:
        pairs = zip(weights.tolist()[0], ids.tolist()[0], strict=True)
        return list(dict.fromkeys(index for _, index in sorted(pairs, reverse=True)))
    flat = ids.reshape(-1)
    order = flat.bincount(weights.reshape(-1).double()).argsort(descending=True)
    ranked: list[int] = order[flat.bincount()[order] > 0].tolist()
    return ranked

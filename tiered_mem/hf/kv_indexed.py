"""Tiered layers of models that select what they read by an indexer (DeepSeek's DSA, Qwen's QSA).

The indexer scores every token at every step, so its keys stay in device memory: one small vector a
token. What it selects reaches attention as a mask, and attention reads only blocks that it shows:
see `kv_attention.Blocks.batches`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicIndexedLayer

from tiered_mem.hf.kv_cache import TIERED_LAYERS, TieredLayer

# Tokens are selected one by one, all over the context: a block should have few of them, but at
# least a page, since a disk reads no less. (`benchmarks/bench_sparse.py` measures other sizes.)
BLOCK_NBYTES = 4096
_LEAST_TOKENS = 256  # of room for indexer keys


class TieredIndexedLayer(TieredLayer, DynamicIndexedLayer):  # type: ignore[misc]
    """A `TieredLayer` with indexer keys [batch, tokens, dim], for transformers' indexers.

    Its blocks have as few tokens as make a page of 4 KiB, and at most `block_tokens`.
    """

    # transformers' own annotations, which mypy can't see into
    indexer_keys: Any
    indexer_position_ids: Any
    is_indexer_initialized: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room: torch.Tensor | None = None  # `indexer_keys` are its first tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        row = sum(states[0, :, 0].numel() for states in (key_states, value_states))
        fewest = -(-BLOCK_NBYTES // (row * key_states.dtype.itemsize))
        self.block_tokens = min(self.block_tokens, fewest)
        super().lazy_initialization(key_states, value_states)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append keys [batch, new tokens, dim]; return all of them, as a view until the next crop.

        Room doubles when it is full, so that a step copies no key but the new ones.
        """
        new = indexer_key_states.detach()
        if not self.is_indexer_initialized:
            self.lazy_initialization_indexer(new)
            self.indexer_keys = new[:, :0]
        start = self.indexer_keys.shape[1]
        end = start + new.shape[1]
        room = self._room
        if room is None or end > room.shape[1] or not self._lie_in(room):
            room = new.new_empty(new.shape[0], max(_LEAST_TOKENS, end, 2 * start), new.shape[2])
            room[:, :start] = self.indexer_keys
        room[:, start:end] = new
        self._room, self.indexer_keys = room, room[:, :end]
        keys: torch.Tensor = self.indexer_keys
        return keys

    def _lie_in(self, room: torch.Tensor) -> bool:
        """Whether the keys are the room's first ones, and it may be written to."""
        writable = not room.is_inference() or torch.is_inference_mode_enabled()
        return writable and bool(self.indexer_keys.data_ptr() == room.data_ptr())

    def reset(self) -> None:
        super().reset()
        self.indexer_keys = self.indexer_position_ids = self._room = None
        self.is_indexer_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :tokens_to_remove]
        if self.is_indexer_initialized:
            self.indexer_keys = self.indexer_keys[:, :tokens_to_remove]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.indexer_position_ids is not None:
            positions = self.indexer_position_ids
            self.indexer_position_ids = positions[:, indices.to(positions.device)]
        if self.is_indexer_initialized:
            self.indexer_keys = self.indexer_keys[indices.to(self.indexer_keys.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids.repeat_interleave(repeats, dim=1)
        if self.is_indexer_initialized:
            self.indexer_keys = self.indexer_keys.repeat_interleave(repeats, dim=0)


TIERED_LAYERS[DynamicIndexedLayer] = TieredIndexedLayer

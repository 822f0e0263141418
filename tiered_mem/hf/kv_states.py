"""What a model has beside blocks at the end of a stored prefix: its sliding windows.

They are stored as blocks of their tokens, which the ends of prefixes share. Which groups have them
is the choice of the DeepSeek-V4 report (3.5.2): all, or those before every so many tokens. Its
third one, none, computes windows again, which isn't exact where they see windows below them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from tiered_mem.errors import ConfigError, UnsupportedModelError
from tiered_mem.hf.kv_cache import TieredCache
from tiered_mem.kv_space import KvSpace
from tiered_mem.prefix_index import Record

Bytes = npt.NDArray[np.uint8]
_BLOCKLESS = ("TieredLayer", "DummyLayer")  # need nothing here


class States:
    """Which states a model's caches have, and which of them are stored."""

    def __init__(
        self, model: PreTrainedModel, cache: TieredCache, block_tokens: int, choice: str | int
    ) -> None:
        """`choice`: "full", "none", or a number of tokens.

        Raises `ConfigError` for another choice, `UnsupportedModelError` where it isn't possible.
        """
        if choice not in ("full", "none") and (
            not isinstance(choice, int) or isinstance(choice, bool) or choice < 1
        ):
            raise ConfigError(
                f"prefix_states is {choice!r}: use 'full', 'none', or every how many tokens"
            )
        self.windows: dict[int, int] = {}  # tokens of the window, by layer
        self._block_tokens = block_tokens
        self._groups_between = 1 if isinstance(choice, str) else -(-choice // block_tokens)
        others = set()
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicSlidingWindowLayer:
                self.windows[number] = layer.sliding_window
            elif type(layer).__name__ not in _BLOCKLESS:
                others.add(type(layer).__name__)
        kind = f"model type {model.config.model_type!r}"
        if others:
            raise UnsupportedModelError(
                f"{kind} has more than blocks and windows in its cache "
                f"({', '.join(sorted(others))}), which can't be stored with them yet: use its KV "
                "without a store of prefixes"
            )
        if choice == "none" and self.windows:
            raise UnsupportedModelError(
                f"{kind} has windows in its cache. What they "
                "hold depends on tokens further back than any that could be computed "
                "again: store them with prefix_states='full', or every so many tokens"
            )

    @property
    def layout(self) -> dict[str, Any]:
        """What of this decides which bytes are stored."""
        if not self.windows:
            return {}
        return {"tokens_between_states": self._groups_between * self._block_tokens}

    def prepare(self, cache: TieredCache) -> None:
        """Have an empty cache keep what is to be stored of its windows."""
        for number, window in self.windows.items():
            space = cache.tiered_layers()[0].space
            cache.layers[number] = SavedWindow(space, number, window, self)

    def wanted(self, group: int, window: int) -> bool:
        """Whether a window's tokens of a group are stored: some stored end needs them."""
        end = -(-(group + 1) // self._groups_between) * self._groups_between
        return group >= self._first(end, window)

    def cut(self, records: Sequence[Record]) -> int:
        """Return how many of the records make a prefix whose end has all its states."""
        return next((n for n in range(len(records), 0, -1) if self._has_all(records, n)), 0)

    def _has_all(self, records: Sequence[Record], num_groups: int) -> bool:
        return all(
            number in records[group].layers
            for number, window in self.windows.items()
            for group in range(self._first(num_groups, window), num_groups)
        )

    def _first(self, num_groups: int, window: int) -> int:
        """The first group that the next token after `num_groups` groups sees of a window."""
        return max(0, num_groups * self._block_tokens - window + 1) // self._block_tokens

    def of_windows(self, records: Sequence[Record]) -> dict[int, list[int]]:
        """Return, by layer, the groups that make its window after all the records."""
        return {
            number: list(range(self._first(len(records), window), len(records)))
            for number, window in self.windows.items()
        }


@dataclass
class _Open:
    """The tokens of a window's layer that don't make a group yet."""

    keys: torch.Tensor
    values: torch.Tensor


class SavedWindow(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding window whose groups of tokens are kept as blocks, until they are stored.

    Of one sequence that only grows; of others it is a window like any.
    """

    def __init__(self, space: KvSpace, number: int, window: int, states: States) -> None:
        super().__init__(sliding_window=window)
        self.space, self.number = space, number
        self.blocks: dict[int, int] = {}  # by group, its index in the space
        self._states = states
        self._block_tokens = states._block_tokens
        self._num_groups = 0
        self._open: _Open | None = None
        self._recording = True
        self._restored: list[Bytes] = []
        self._indices: list[int] = []  # for the finalizer, that must not keep the layer alive
        weakref.finalize(self, space.abandon, number, self._indices)

    def restore(self, num_groups: int, blocks: list[Bytes]) -> None:
        """Start with the blocks before the end of `num_groups` groups, the last ones in order."""
        self._num_groups = num_groups
        self.cumulative_length = num_groups * self._block_tokens
        self._restored = blocks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        sizes = [self._block_tokens * s[0, :, 0].numel() for s in (key_states, value_states)]
        self._nbytes = sum(sizes) * key_states.dtype.itemsize
        if self._restored:
            blocks, self._restored = self._restored, []
            if any(block.nbytes != self._nbytes for block in blocks):
                raise ConfigError(
                    f"stored blocks of layer {self.number} aren't of {self._nbytes} bytes: they "
                    "are another model's; use another store"
                )
            whole = [
                torch.from_numpy(b).view(key_states.dtype).tensor_split(sizes[:1]) for b in blocks
            ]
            self.keys = self._window([keys for keys, _ in whole], key_states)
            self.values = self._window([values for _, values in whole], value_states)

    def _window(self, parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        batch, heads, _, dim = like.shape
        blocks = [part.view(1, heads, self._block_tokens, dim) for part in parts]
        whole = torch.cat(blocks, dim=-2)[..., -self.sliding_window + 1 :, :]
        return whole.to(like.device).expand(batch, -1, -1, -1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) > 1 or self.record_past:
            self._recording = False
        if self._recording:
            self._keep(key_states, value_states)
        found: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, *args, **kwargs
        )
        return found

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._open is not None:
            keys = torch.cat([self._open.keys, keys], dim=-2)
            values = torch.cat([self._open.values, values], dim=-2)
        num_full = keys.shape[-2] // self._block_tokens
        groups = range(self._num_groups, self._num_groups + num_full)
        wanted = [group for group in groups if self._states.wanted(group, self.sliding_window)]
        if wanted:
            self.space.add_layer(self.number, self._nbytes)
            blocks = [self._pack(keys, values, group - self._num_groups) for group in wanted]
            indices = self.space.create(self.number, blocks, admit=False)
            self._indices.extend(indices)
            self.blocks.update(zip(wanted, indices, strict=True))
        self._num_groups += num_full
        end = num_full * self._block_tokens
        # Clones: a slice would keep the whole prompt's memory.
        self._open = _Open(keys[..., end:, :].clone(), values[..., end:, :].clone())

    def _pack(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> torch.Tensor:
        span = slice(position * self._block_tokens, (position + 1) * self._block_tokens)
        parts = (keys[0, :, span], values[0, :, span])
        return torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)

    def reset(self) -> None:
        self._recording = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self._recording = self._recording and tokens_to_remove == 0
        super().crop(tokens_to_remove)

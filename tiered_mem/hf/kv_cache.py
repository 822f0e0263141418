"""A transformers cache whose full-attention layers keep their tokens in blocks on a runtime.

A block is `block_tokens` tokens of one sequence in one layer: its keys [heads, tokens, key_dim],
then its values [heads, tokens, value_dim]. The last, open block of every sequence stays in device
memory as the layer's tail; full ones are sealed, and move between the tiers. Sliding windows and
recurrent states are bounded, and stay where transformers keeps them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from tiered_mem._core import Extent
from tiered_mem.device.host import HOST
from tiered_mem.errors import ConfigError, UnsupportedModelError
from tiered_mem.hf.kv_attention import LazyStates, Piece
from tiered_mem.keys import BlockKey
from tiered_mem.kv_space import KvSpace
from tiered_mem.reading import blocks_of_wave

BLOCK_TOKENS = 128


class TieredCache(DynamicCache):  # type: ignore[misc]
    """A `DynamicCache` for `generate(past_key_values=...)` and for a model's own forward.

    Made by `model.tiered_mem.cache()`. Its blocks go when it is collected, or by `close`.
    """

    def __init__(
        self, space: KvSpace, config: PreTrainedConfig, block_tokens: int = BLOCK_TOKENS
    ) -> None:
        """Raises as `check`."""
        super().__init__(config=config)
        self.check(config, block_tokens)
        for number, layer in enumerate(self.layers):
            if (tiered_class := self.tiered_class(type(layer))) is not None:
                self.layers[number] = tiered_class(space, number, block_tokens)
        tiered = self.tiered_layers()
        self.num_tiered = len(tiered)
        for layer, following in zip(tiered, tiered[1:] + tiered[:1], strict=True):
            layer.following = weakref.ref(following)

    @staticmethod
    def check(config: PreTrainedConfig, block_tokens: int) -> None:
        """Raise `ConfigError` for blocks without tokens, `UnsupportedModelError` for a model none
        of whose layers keep all keys and values."""
        if not isinstance(block_tokens, int) or block_tokens < 1:
            raise ConfigError(f"block_tokens is {block_tokens}: a block has at least one token")
        if not any(type(layer) in TIERED_LAYERS for layer in DynamicCache(config=config).layers):
            raise UnsupportedModelError(
                f"model type {config.model_type!r} has no layer that keeps all its keys and "
                "values: its cache is bounded, or of a kind of its own; load it without kv"
            )

    @staticmethod
    def tiered_class(stock: type) -> type[TieredLayer] | None:
        """Return what stands for a layer of transformers' own; None if it stays."""
        return TIERED_LAYERS.get(stock)

    @property
    def num_gathered(self) -> int:
        """How often a layer had to be put together whole, for code that isn't our attention."""
        return sum(layer.num_gathered for layer in self.tiered_layers())

    def tiered_layers(self) -> list[TieredLayer]:
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    def close(self) -> None:
        """Give the blocks back."""
        for layer in self.tiered_layers():
            layer.reset()


class TieredLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's blocks and tail. `rows[r]` are the indices of row r's sealed blocks, in order."""

    def __init__(self, space: KvSpace, number: int, block_tokens: int) -> None:
        super().__init__()
        self.space = space
        self.number = number
        self.block_tokens = block_tokens
        self.rows: list[list[int]] = []
        self.following: weakref.ref[TieredLayer] | None = None  # of the next one that has blocks
        self.num_gathered = 0
        self._selected: list[int] = []  # blocks that the last step read, if not all
        self.repeated: float | None = None  # share of them that the step after reads: running mean
        self._adopted: tuple[list[tuple[BlockKey, Extent]], Callable[[BlockKey], None]] | None
        self._adopted = None
        # Holds the table, not the layer: a finalizer must not keep what it is for alive.
        weakref.finalize(self, _abandon, space, number, self.rows)

    @property
    def num_sealed(self) -> int:
        """Tokens in sealed blocks."""
        return len(self.rows[0]) * self.block_tokens if self.rows else 0

    @property
    def num_tail(self) -> int:
        return int(self.keys.shape[-2]) if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if value_states.dtype != self.dtype:
            raise ConfigError(f"keys are {self.dtype}, values {value_states.dtype}: not supported")
        if self.device != self.space.backend.device:
            raise ConfigError(
                f"layer {self.number} computes on {self.device}, the runtime is on "
                f"{self.space.backend.device}: load the model to one device"
            )
        self.keys = key_states[..., :0, :]
        self.values = value_states[..., :0, :]
        heads = key_states.shape[1]
        keys, values = (heads * self.block_tokens * t.shape[-1] for t in (key_states, value_states))
        self._split = keys  # elements of K in a block
        self.block_nbytes = (keys + values) * self.dtype.itemsize
        self._keys_in_block, self._values_in_block = (
            _dense(1, heads, self.block_tokens, t.shape[-1]) for t in (key_states, value_states)
        )
        self.space.add_layer(self.number, self.block_nbytes)
        if not self.rows:
            self.rows.extend([] for _ in range(key_states.shape[0]))
        self._take_adopted()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens. Returns stand-ins for all keys and values: see `LazyStates`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seal()  # if nobody attended to what came before
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        view = self.view()
        return (
            LazyStates(view, self.keys, is_keys=True),
            LazyStates(view, self.values, is_keys=False),
        )

    def view(self) -> View:
        """Return what is there to attend to now."""
        return View(self)

    def seal(self) -> None:
        """Turn the full blocks of the tail into blocks of the runtime."""
        num_full = self.num_tail // self.block_tokens
        if num_full == 0:
            return
        end = num_full * self.block_tokens
        for row, table in enumerate(self.rows):
            blocks = [
                self._pack(row, start, start + self.block_tokens)
                for start in range(0, end, self.block_tokens)
            ]
            table.extend(self.space.create(self.number, blocks))
        # Clones: a slice would keep the whole tail's memory.
        self.keys = self.keys[..., end:, :].clone()
        self.values = self.values[..., end:, :].clone()

    def adopt(
        self,
        places: Sequence[tuple[BlockKey, Extent]],
        damaged: Callable[[BlockKey], None],
    ) -> None:
        """Start an empty layer with sealed blocks of another store, of one sequence, in order.

        See `KvSpace.adopt`.
        """
        self._adopted = (list(places), damaged)

    def read_block(self, group: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of sealed block `group` of the first sequence, in host memory."""
        out = np.empty(self.block_nbytes, np.uint8)
        with self.space.begin(self.number, [self.rows[0][group]]) as reading:
            for _, slot in reading:
                HOST.wrap(out).copy_(self.space.view(slot, self.block_nbytes))
        return out

    def batches(self, wanted: torch.Tensor | None = None) -> Iterator[list[Piece]]:
        """Yield all tokens in pieces: the tail, then blocks as they arrive.

        With `wanted`, bool [batch or 1, tokens] on the host, only blocks that have one of those.
        A piece's views are good until the next step.
        """
        places = self._places(self._wanted_groups(wanted))
        indices = list(places)
        self._note_selection([] if wanted is None else indices)
        wave = blocks_of_wave(self.space.tiers, self.block_nbytes)
        with self.space.begin(self.number, indices, wave) as reading:
            if self.num_tail:
                yield [Piece(self.num_sealed, None, self.keys, self.values)]
            left, hinted = len(indices), False
            for positions, slots in reading.waves():
                left -= len(positions)
                if left <= wave and not hinted:  # the last wave is on its way
                    self._hint_following(wave)
                    hinted = True
                yield [
                    Piece(group * self.block_tokens, rows, *self._views(slot))
                    for position, slot in zip(positions, slots, strict=True)
                    for group, rows in places[indices[position]]
                ]

    def _hint_following(self, num_blocks: int) -> None:
        """Let blocks of the next layer come once this one's have, while others compute.

        Any sooner they would only take slots from this one's.
        """
        following = self.following() if self.following is not None else None
        if following is not None and following is not self and following.rows:
            self.space.hint(following.number, following._likely(num_blocks))

    def _likely(self, num_blocks: int) -> list[int]:
        """Return blocks that the next step reads: the first ones of all, or what was selected last.

        A selection is only worth guessing if more than half of it tends to come again.
        """
        if not self._selected:
            return self.rows[0][:num_blocks]
        if self.repeated is None or self.repeated < 0.5:
            return []
        return self._selected[: int(self.space.tiers.max_event(self.block_nbytes)) // 4]

    def _note_selection(self, indices: list[int]) -> None:
        if self._selected and indices:
            again = len(set(self._selected).intersection(indices)) / len(self._selected)
            before = again if self.repeated is None else self.repeated
            self.repeated = before + (again - before) / 4
        self._selected = indices

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, [batch, heads, tokens, dim], in memory of the device."""
        num_tokens = self.get_seq_length()
        keys, values = (
            tail.new_empty(*tail.shape[:-2], num_tokens, tail.shape[-1])
            for tail in (self.keys, self.values)
        )
        for pieces in self.batches():
            for piece in pieces:
                rows = slice(None) if piece.rows is None else piece.rows
                span = slice(piece.start, piece.start + piece.keys.shape[-2])
                keys[rows, :, span] = piece.keys
                values[rows, :, span] = piece.values
        return keys, values

    def _take_adopted(self) -> None:
        """Take the blocks in, now that their size is known."""
        if self._adopted is None:
            return
        places, damaged = self._adopted
        self._adopted = None
        if any(extent.nbytes != self.block_nbytes for _, extent in places):
            raise ConfigError(
                f"stored blocks of layer {self.number} aren't of {self.block_nbytes} bytes: they "
                "are another model's; use another store"
            )
        indices = self.space.adopt(self.number, places, damaged)
        self.rows[0].extend(indices)
        for table in self.rows[1:]:  # beams of the one sequence
            self.space.share(self.number, indices)
            table.extend(indices)

    def get_seq_length(self) -> int:
        if self._adopted is not None:
            return len(self._adopted[0]) * self.block_tokens
        return self.num_sealed + self.num_tail

    def reset(self) -> None:
        self._adopted = None
        for table in self.rows:
            self.space.release(self.number, table)
        self.rows.clear()
        self._selected = []
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. Raises `ConfigError` if that is positive."""
        if tokens_to_remove > 0:
            raise ConfigError(f"crop({tokens_to_remove}): give a negative number of tokens")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        keep = max(0, self.get_seq_length() + tokens_to_remove)
        if keep >= self.num_sealed:
            self._cut_tail(keep - self.num_sealed)
            return
        num_groups, rest = divmod(keep, self.block_tokens)
        self._reopen(num_groups)
        self._cut_tail(rest)

    def offload(self) -> None:
        """Blocks move by themselves."""

    def prefetch(self) -> None:
        """Blocks move by themselves."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        chosen = torch.arange(len(self.rows))[indices.cpu()].tolist()
        self._choose_rows(chosen)
        self.keys = self.keys[indices.to(self.device)]
        self.values = self.values[indices.to(self.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.is_initialized:
            return
        self._choose_rows([row for row in range(len(self.rows)) for _ in range(repeats)])
        self.keys = self.keys.repeat_interleave(repeats, dim=0)
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def _choose_rows(self, chosen: Sequence[int]) -> None:
        self._selected = []
        tables = [list(self.rows[row]) for row in chosen]
        for table in tables:
            self.space.share(self.number, table)
        for table in self.rows:
            self.space.release(self.number, table)
        self.rows[:] = tables

    def _wanted_groups(self, wanted: torch.Tensor | None) -> list[Sequence[int]]:
        """Return, by row, the groups whose blocks have a wanted token."""
        if wanted is None:
            return [range(len(table)) for table in self.rows]
        sealed = wanted[:, : self.num_sealed]
        by_group = torch.unflatten(sealed, 1, (-1, self.block_tokens)).any(2)
        groups: list[Sequence[int]] = [np.flatnonzero(row).tolist() for row in by_group.numpy()]
        return groups if len(groups) == len(self.rows) else groups * len(self.rows)

    def _places(
        self, groups: Sequence[Sequence[int]]
    ) -> dict[int, list[tuple[int, torch.Tensor | None]]]:
        """Return, by block of the rows' `groups`, where it stands: (group, batch rows), the rows
        None if that is all."""
        if len(self.rows) == 1:
            table = self.rows[0]
            return {table[group]: [(group, None)] for group in groups[0]}
        found: dict[int, dict[int, list[int]]] = {}
        for row, table in enumerate(self.rows):
            for group in groups[row]:
                found.setdefault(table[group], {}).setdefault(group, []).append(row)
        return {
            index: [
                (group, None if len(which) == len(self.rows) else torch.tensor(which))
                for group, which in groups.items()
            ]
            for index, groups in found.items()
        }

    def _pack(self, row: int, start: int, end: int) -> torch.Tensor:
        parts = (self.keys[row, :, start:end], self.values[row, :, start:end])
        return torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)

    def _views(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the block in a slot, [1, heads, tokens, dim] each."""
        memory, first = self.space.elements(slot, self.block_nbytes, self.dtype)
        return (
            memory.as_strided(*self._keys_in_block, first),
            memory.as_strided(*self._values_in_block, first + self._split),
        )

    def _cut_tail(self, num_tokens: int) -> None:
        self.keys = self.keys[..., :num_tokens, :]
        self.values = self.values[..., :num_tokens, :]

    def _reopen(self, group: int) -> None:
        """Make sealed block `group` of every row the tail, and forget those after it."""
        keys, values = (
            tail.new_empty(*tail.shape[:-2], self.block_tokens, tail.shape[-1])
            for tail in (self.keys, self.values)
        )
        wanted = {table[group] for table in self.rows}
        indices = sorted(wanted)
        with self.space.begin(self.number, indices) as reading:
            for position, slot in reading:
                for row, table in enumerate(self.rows):
                    if table[group] == indices[position]:
                        block_keys, block_values = self._views(slot)
                        keys[row], values[row] = block_keys[0], block_values[0]
        for table in self.rows:
            self.space.release(self.number, table[group:])
            del table[group:]
        self._selected = []
        self.keys, self.values = keys, values


# What stands for each of transformers' layers; other modules add theirs.
TIERED_LAYERS: dict[type, type[TieredLayer]] = {DynamicLayer: TieredLayer}


class View:
    """What one update left to attend to: `tiered_mem.hf.kv_attention.Blocks`."""

    def __init__(self, layer: TieredLayer) -> None:
        self._layer = layer
        self.num_tokens = layer.get_seq_length()
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    def whole(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        self._check()
        return None if self._layer.num_sealed else (self._layer.keys, self._layer.values)

    def batches(self, wanted: torch.Tensor | None = None) -> Iterator[list[Piece]]:
        self._check()
        yield from self._layer.batches(wanted)
        self.finish()

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._gathered is None:
            self._check()
            self._gathered = self._layer.gather()
            self._layer.num_gathered += 1
            self.finish()
        return self._gathered

    def finish(self) -> None:
        self._layer.seal()

    def _check(self) -> None:
        if self._layer.get_seq_length() != self.num_tokens:
            raise ConfigError(
                f"the keys of layer {self._layer.number} were kept beyond the next step: the cache "
                f"has {self._layer.get_seq_length()} tokens now, they had {self.num_tokens}"
            )


def _dense(*shape: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a shape and its strides, in elements."""
    return shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _abandon(space: KvSpace, layer: int, rows: list[list[int]]) -> None:
    indices = [index for table in rows for index in table]
    if indices:
        space.abandon(layer, indices)

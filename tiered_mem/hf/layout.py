"""Where the tensors of one expert lie inside its block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from tiered_mem.catalogue import ALIGNMENT, round_up

# Cache-line and vector friendly, and a multiple of every element size, so that a view of a
# block (which itself starts 4096-aligned) is always aligned for its dtype.
FIELD_ALIGNMENT = 64

Views = dict[str, torch.Tensor]


class Field(NamedTuple):
    """One tensor of an expert: its parameter name, the shape for ONE expert, dtype and offset."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertLayout:
    """The tensors of one expert, one after another in a block of `nbytes` bytes.

    All experts of one module share a layout. Each field lies in the memory order the transformers
    Experts module expects, so at run time a view of the block *is* the weight. Not so where the
    block is `quantised`: then `weights` makes the weights out of the views, anew for each use.
    """

    num_experts: int
    fields: tuple[Field, ...]
    dequantise: Callable[[Views], Views] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @classmethod
    def build(
        cls,
        num_experts: int,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        dequantise: Callable[[Views], Views] | None = None,
    ) -> ExpertLayout:
        """Lay out `tensors`, a map from name to (shape of one expert, dtype), in that order."""
        fields = []
        offset = 0
        for name, (shape, dtype) in tensors.items():
            placed = Field(name, tuple(shape), dtype, offset)
            fields.append(placed)
            offset += round_up(placed.nbytes, FIELD_ALIGNMENT)
        return cls(num_experts, tuple(fields), dequantise)

    @classmethod
    def of_module(cls, module: nn.Module) -> ExpertLayout:
        """Return the layout of an Experts module that still has its parameters, meta or real."""
        tensors = per_expert_tensors(module)
        shapes = {name: (tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()}
        return cls.build(num_experts(module), shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of one block, up to the end of its last field."""
        return max((field.offset + field.nbytes for field in self.fields), default=0)

    @property
    def slot_nbytes(self) -> int:
        """Bytes that a block takes in a tier: slots are whole pages."""
        return round_up(self.nbytes, ALIGNMENT)

    @property
    def itemsize(self) -> int:
        """Element size of the largest field: what a codec that splits byte planes goes by."""
        return max(self.fields, key=lambda field: field.nbytes).dtype.itemsize

    def views(self, block: torch.Tensor) -> Views:
        """Return each field as a view into `block`, uint8 [>= nbytes]. No byte is copied."""
        if block.dtype != torch.uint8 or block.dim() != 1 or block.numel() < self.nbytes:
            raise ValueError(
                f"a block of this layout is a uint8 tensor of one dimension and at least "
                f"{self.nbytes} elements, not {block.dtype} of shape {tuple(block.shape)}"
            )
        return {
            field.name: block[field.offset : field.offset + field.nbytes]
            .view(field.dtype)
            .view(field.shape)
            for field in self.fields
        }

    @property
    def quantised(self) -> bool:
        """Whether the block's fields have to be converted to be weights."""
        return self.dequantise is not None

    def weights(self, views: Views) -> Views:
        """Return the parameters of the expert whose block has these `views`, by name.

        They are the views themselves, or, of a quantised block, new tensors on the same device.
        """
        return views if self.dequantise is None else self.dequantise(views)

    def clear_padding(self, block: torch.Tensor) -> None:
        """Zero the bytes between fields, so that equal experts make equal blocks."""
        for field, following in zip(self.fields, self.fields[1:], strict=False):
            block[field.offset + field.nbytes : following.offset].zero_()

    def copy_expert(self, module: nn.Module, index: int, out: torch.Tensor) -> None:
        """Copy expert `index` of a module that has its parameters into `out`, uint8 [>= nbytes]."""
        tensors = per_expert_tensors(module)
        self.clear_padding(out)
        for name, view in self.views(out).items():
            view.copy_(tensors[name].detach()[index])

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain JSON values, for a store's metadata."""
        return {
            "num_experts": self.num_experts,
            "fields": [
                [name, list(shape), str(dtype).removeprefix("torch."), offset]
                for name, shape, dtype, offset in self.fields
            ],
        }


def num_experts(module: nn.Module) -> int:
    """Return how many experts an Experts module holds."""
    return int(module.num_experts)  # type: ignore[arg-type]


def per_expert_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's own parameters and persistent buffers of shape [num_experts, ...].

    Weights, biases and quantisation scales alike, whatever their dtype. What an Experts module
    shares between its experts (a norm in a submodule, a lookup table) isn't among them.
    """
    count = num_experts(module)
    persistent = {
        name: buffer
        for name, buffer in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }
    return {
        name: tensor
        for name, tensor in {**module._parameters, **persistent}.items()
        if tensor is not None and tensor.dim() > 0 and tensor.shape[0] == count
    }

"""Experts that stay quantised: in the store, in every tier and on every link.

A block then holds the file's own tensors (fp8 or fp4 values and the scales of their blocks), and
transformers' own conversion makes the weights from them, each time an expert is used. What is
computed is therefore, bit for bit, what the model computes that transformers dequantises while
loading (`dequantize=True`), at the bytes of the checkpoint and the cost of a conversion per use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tiered_mem.errors import CheckpointError
from tiered_mem.hf.layout import Views
from tiered_mem.hf.recipe import Reader, Recipe
from tiered_mem.hf.tensor_file import TensorInfo


class Dequantiser:
    """Makes the weights of an expert of one layer from the views of its block.

    A field of the block that is the name of a parameter is the weight itself. The others are named
    by the source patterns of the recipes that make the rest.
    """

    def __init__(
        self, layer: str, recipes: Sequence[Recipe], one: nn.Module, config: Any, quantizer: Any
    ) -> None:
        """`one` declares the layer's parameters for one expert, by their full names, on meta."""
        self._prefix = layer + "."
        self._recipes = list(recipes)
        self._context = (one, config, quantizer)

    def __call__(self, views: Views) -> Views:
        weights = dict(views)
        for recipe in self._recipes:
            stored = {pattern: weights.pop(pattern) for pattern in recipe.sources}
            for target, made in recipe.convert_one(stored, *self._context).items():
                weights[target.removeprefix(self._prefix)] = made.detach()[0]
        return weights


def is_smaller_stored(recipe: Recipe, read: Reader, made: Mapping[str, torch.Tensor]) -> bool:
    """Whether an expert's tensors of the file take fewer bytes than the parameters they make."""
    if not recipe.by_expert or any(dtype is not None for dtype in recipe.dtypes.values()):
        return False  # made from the layer's tensors together, or no more than cast
    stored = recipe.read_one(0, read).values()
    return sum(t.nbytes for t in stored) < sum(made[target].nbytes for target in recipe.targets)


def check_scales(recipe: Recipe, infos: Mapping[str, TensorInfo], quantizer: Any) -> None:
    """Raise `CheckpointError` unless fp8 matrices have a scale for each block of the config's size.

    transformers takes the size of a block from the number of scales: too few or too many would
    give other weights, silently.
    """
    block_size = getattr(getattr(quantizer, "quantization_config", None), "weight_block_size", None)
    for pattern, keys in recipe.sources.items():
        scales = recipe.sources.get(f"{pattern}_scale_inv")
        if not block_size or scales is None or infos[keys[0]].format_dtype != "F8_E4M3":
            continue
        for key, scale in zip(keys, scales, strict=False):
            shape, grid = infos[key].shape[-2:], infos[scale].shape[-2:]
            expected = tuple(math.ceil(n / b) for n, b in zip(shape, block_size, strict=True))
            if grid != expected or any(n % b for n, b in zip(shape, block_size, strict=True)):
                raise CheckpointError(
                    f"{scale} has shape {list(grid)}, but {key} of shape {list(shape)} has "
                    f"{list(expected)} blocks of {list(block_size)} (weight_block_size of the "
                    "config), whole ones needed; the checkpoint is damaged or another's config"
                )

"""Experts that stay quantised: in the store, in every tier and on every link.

A block then holds the file's own tensors (fp8 or fp4 values and the scales of their blocks), and
transformers' own conversion makes the weights from them, each time an expert is used. What is
computed is, bit for bit, what the model computes that transformers dequantises while loading, at
the bytes of the checkpoint and the cost of a conversion for each use.

`quantization_config` decides, as for transformers:

- without one, or with one that doesn't say `dequantize=True`: experts stay quantised;
- `dequantize=True`: they are dequantised when they are packed; more bytes, no conversion.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

from tiered_mem.config import format_size
from tiered_mem.errors import CheckpointError
from tiered_mem.hf.dequantise import faster
from tiered_mem.hf.layout import ExpertLayout, Views
from tiered_mem.hf.recipe import Reader, Recipe
from tiered_mem.hf.tensor_file import TensorInfo

#: Methods that transformers dequantises exactly as it reads the file, on any device.
_KEPT = ("fp8", "mxfp4")


def asks_to_dequantise(hf_kwargs: Mapping[str, Any]) -> bool:
    """Whether these options of `from_pretrained` ask for weights dequantised while loading."""
    return bool(getattr(hf_kwargs.get("quantization_config"), "dequantize", False))


def loading_options(config: Any, hf_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options to load a model of this config with, so that its experts can be tiered.

    Where transformers would compute from quantised weights by kernels of its own (on a GPU, fetched
    from the hub), it is told to build the dequantised model, unless `quantization_config` is given.
    """
    stored = getattr(config, "quantization_config", None)
    if hf_kwargs.get("quantization_config") is not None or stored is None:
        return dict(hf_kwargs)
    stored = dict(stored if isinstance(stored, Mapping) else stored.to_dict())
    if str(stored.get("quant_method")) not in _KEPT:
        return dict(hf_kwargs)
    asked = AutoQuantizationConfig.from_dict(stored | {"dequantize": True})
    return {**hf_kwargs, "quantization_config": asked}


def tell_of_conversions(layouts: Sequence[ExpertLayout], dtype: torch.dtype) -> None:
    """Say once for each size and dtype that experts are converted for each use, and the way out."""
    if not any(layout.quantised for layout in layouts):
        return
    nbytes = sum(layout.num_experts * layout.nbytes for layout in layouts)
    _tell(format_size(nbytes), str(dtype).removeprefix("torch."))


@functools.cache
def _tell(size: str, dtype: str) -> None:
    warnings.warn(
        f"experts stay quantised in the store and in every tier ({size}); each use of one converts "
        f"it to {dtype} first, on a CPU in some ten times the time of a token's matmul. To convert "
        "them once, when they are packed, into more bytes: pass quantization_config with "
        "dequantize=True",
        stacklevel=2,
    )


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
        self._recipes = [_with_fast_operations(recipe, quantizer) for recipe in recipes]
        self._context = (one, config, quantizer)

    def __call__(self, views: Views) -> Views:
        weights = dict(views)
        for recipe in self._recipes:
            stored = {pattern: weights.pop(pattern) for pattern in recipe.sources}
            for target, made in recipe.convert_one(stored, *self._context).items():
                weights[target.removeprefix(self._prefix)] = made.detach()[0]
        return weights


def _with_fast_operations(recipe: Recipe, quantizer: Any) -> Recipe:
    converter = copy.copy(recipe.converter)
    if converter is not None:
        converter.operations = [faster(operation, quantizer) for operation in converter.operations]
    return replace(recipe, converter=converter)


def is_smaller_stored(recipe: Recipe, read: Reader, made: Mapping[str, torch.Tensor]) -> bool:
    """Whether an expert's tensors of the file take fewer bytes than the parameters they make."""
    if not recipe.by_expert or any(dtype is not None for dtype in recipe.dtypes.values()):
        return False  # made from the layer's tensors together, or no more than cast
    stored = recipe.read_one(0, read).values()
    return sum(t.nbytes for t in stored) < sum(made[target].nbytes for target in recipe.targets)


def require_one_format(recipe: Recipe, infos: Mapping[str, TensorInfo]) -> None:
    """Raise `CheckpointError` unless the experts are all stored in the same format."""
    for keys in recipe.sources.values():
        expected = infos[keys[0]].format_dtype
        for key in keys:
            if infos[key].format_dtype != expected:
                raise CheckpointError(
                    f"tensor {key} is {infos[key].format_dtype}, but {keys[0]} of the same layer "
                    f"{expected}; pass quantization_config with dequantize=True"
                )


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

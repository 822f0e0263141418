"""The experts of one layer of a checkpoint: how their tensors become blocks, and blocks weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tiered_mem.errors import CheckpointError
from tiered_mem.hf.layout import ExpertLayout, num_experts, per_expert_tensors
from tiered_mem.hf.quantised import (
    Dequantiser,
    check_scales,
    is_smaller_stored,
    require_one_format,
)
from tiered_mem.hf.recipe import Reader, Recipe
from tiered_mem.hf.tensor_file import TensorInfo


class ExpertLayer:
    """The recipes of one Experts module, and meta models that declare its parameters.

    `kept` are the targets of the recipes that run when an expert is used, not when it is read.
    """

    def __init__(self, name: str, module: nn.Module, recipes: dict[str, Recipe]) -> None:
        self.name = name
        self.num_experts = num_experts(module)
        self.kept: frozenset[str] = frozenset()
        self._declared = {f"{name}.{p}": t for p, t in per_expert_tensors(module).items()}
        for target in self._declared:
            if target not in recipes:
                raise CheckpointError(
                    f"the checkpoint has no tensor for {target}; it is incomplete or was saved by "
                    "another architecture"
                )
        self.recipes = list({id(r): r for r in (recipes[t] for t in self._declared)}.values())
        self.all = _skeleton({t: x.to("meta") for t, x in self._declared.items()})
        self.one = _skeleton({t: x[:1].to("meta") for t, x in self._declared.items()})

    def field(self, target: str) -> str:
        """The name of a parameter in its module, or "" if it belongs to another module."""
        return target.removeprefix(self.name + ".") if target in self._declared else ""

    def lay_out(
        self, infos: Mapping[str, TensorInfo], config: Any, quantizer: Any, keep_stored: bool
    ) -> ExpertLayout:
        """Run the recipes on meta tensors: the layout, or `CheckpointError` for a wrong shape.

        With `keep_stored` what is quantised in the file stays so, where that is smaller.
        """

        def read(key: str, begin: int, end: int | None) -> torch.Tensor:
            tensor = torch.empty(infos[key].shape, dtype=infos[key].dtype, device="meta")
            return tensor if end is None else tensor[begin:end]

        made: dict[str, torch.Tensor] = {}
        kept: list[Recipe] = []
        for recipe in self.recipes:
            recipe.check(self.num_experts, infos)
            check_scales(recipe, infos, quantizer)
            weights = self._run(recipe, read, infos, config, quantizer)
            made |= weights
            if keep_stored and is_smaller_stored(recipe, read, weights):
                require_one_format(recipe, infos)
                kept.append(recipe)
        self._check_shapes(made)
        self.kept = frozenset(recipe.target for recipe in kept)

        late = {target for recipe in kept for target in recipe.targets}
        tensors = {
            self.field(target): (tuple(made[target].shape[1:]), made[target].dtype)
            for target in self._declared
            if target not in late
        }
        for recipe in kept:
            stored = recipe.read_one(0, read)
            tensors |= {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
        dequantise = Dequantiser(self.name, kept, self.one, config, quantizer) if kept else None
        return ExpertLayout.build(self.num_experts, tensors, dequantise)

    def _run(
        self,
        recipe: Recipe,
        read: Reader,
        infos: Mapping[str, TensorInfo],
        config: Any,
        quantizer: Any,
    ) -> dict[str, torch.Tensor]:
        try:
            if recipe.by_expert:
                return recipe.make_one(0, read, self.one, config, quantizer)
            return recipe.make(read, self.all, config, quantizer)
        except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as error:
            shapes = {key: list(infos[key].shape) for key in recipe.keys[:4]}
            raise CheckpointError(
                f"the tensors of {recipe.target} can't be converted ({error}); "
                f"the file has {shapes}"
            ) from error

    def _check_shapes(self, made: Mapping[str, torch.Tensor]) -> None:
        for target, declared in self._declared.items():
            tensor = made.get(target)
            shape = None if tensor is None else tuple(tensor.shape[1:])
            if shape != tuple(declared.shape[1:]):
                raise CheckpointError(
                    f"one expert's {target} has shape {list(shape or ())} in the checkpoint, "
                    f"{list(declared.shape[1:])} in the model; the config isn't this checkpoint's"
                )


def _skeleton(parameters: dict[str, torch.Tensor]) -> nn.Module:
    """A module tree that has only these parameters, by their dotted names."""
    root = nn.Module()
    for name, tensor in parameters.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root

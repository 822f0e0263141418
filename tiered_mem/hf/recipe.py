"""How file tensors become expert parameters, by transformers' own conversion mapping.

`group_keys` assigns file keys to parameters exactly as transformers' loader does; `Recipe` then
runs the mapping's own conversion operations. Operations that treat every expert alike are run on
one expert's slices; any other (Ernie-VL's split of one list into text and vision experts, say)
needs the tensors of the whole layer at once.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tiered_mem.errors import CheckpointError
from tiered_mem.hf.loading import Loading
from tiered_mem.hf.tensor_file import TensorInfo

Reader = Callable[[str, int, int | None], torch.Tensor]


@dataclass
class Recipe:
    """The file keys behind one parameter (or the several that one conversion yields).

    `sources` maps each source pattern of `converter` to its keys; the position in that list is the
    expert's number where the file holds one tensor per expert. Without a converter there is one
    key, and its tensor is the parameter.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dtypes: dict[str, torch.dtype | None] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Names of all parameters the conversion yields."""
        if self.converter is None:
            return [self.target]
        first, *_ = patterns = self.converter.target_patterns
        return [self.target.replace(first, pattern) for pattern in patterns]

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    def describe(self) -> str:
        """A stable text of what is done to which keys, for the checkpoint's fingerprint."""
        operations = self.converter.operations if self.converter is not None else []
        return f"{self.targets} <- {dict(self.sources)} by {operations}"

    @property
    def by_expert(self) -> bool:
        """Whether one expert's slices suffice to make one expert's parameters."""
        operations = self.converter.operations if self.converter is not None else []
        return all(_treats_experts_alike(operation) for operation in operations)

    def check(self, num_experts: int, infos: Mapping[str, TensorInfo]) -> None:
        """Raise `CheckpointError` unless each expert has its tensor, shaped like its siblings'."""
        if not self.by_expert:
            return  # an operation of its own kind: only itself knows what it needs
        for keys in self.sources.values():
            first, shape = keys[0], infos[keys[0]].shape
            if len(keys) == 1:
                if not shape or shape[0] != num_experts:
                    raise CheckpointError(
                        f"tensor {first} has shape {list(shape)}, which isn't {num_experts} experts"
                    )
            elif len(keys) != num_experts:
                raise CheckpointError(
                    f"{len(keys)} tensors like {first} for the {num_experts} experts of "
                    f"{self.target}; the checkpoint is incomplete"
                )
            for key in keys:
                if infos[key].shape != shape:
                    raise CheckpointError(
                        f"tensor {key} has shape {list(infos[key].shape)}, "
                        f"but {first} of the same layer {list(shape)}"
                    )

    def make(self, read: Reader, model: nn.Module, config: Any, quantizer: Any) -> dict[str, Any]:
        """Make the parameters of all experts, shape [num_experts, ...].

        `read(key, begin, end)` returns a file tensor or its rows; `model` has the parameters'
        names, shapes and dtypes (on meta), which some operations ask for.
        """
        tensors = {
            pattern: [self._cast(key, read(key, 0, None)) for key in keys]
            for pattern, keys in self.sources.items()
        }
        return self._convert(tensors, model, config, quantizer)

    def make_one(
        self, index: int, read: Reader, model: nn.Module, config: Any, quantizer: Any
    ) -> dict[str, Any]:
        """Make the parameters of one expert, shape [1, ...], reading only its bytes.

        Only where `by_expert` holds; `model` must then declare parameters of shape [1, ...].
        """
        tensors = {}
        for pattern, tensor in self.read_one(index, read).items():
            keys = self.sources[pattern]
            tensors[pattern] = self._cast(keys[index if len(keys) > 1 else 0], tensor)
        return self.convert_one(tensors, model, config, quantizer)

    def read_one(self, index: int, read: Reader) -> dict[str, torch.Tensor]:
        """Read one expert's tensors as the file has them, by source pattern.

        Of a tensor of all experts, its row. Only where `by_expert` holds.
        """
        return {
            pattern: read(keys[index], 0, None)
            if len(keys) > 1
            else read(keys[0], index, index + 1)[0]
            for pattern, keys in self.sources.items()
        }

    def convert_one(
        self, tensors: Mapping[str, torch.Tensor], model: nn.Module, config: Any, quantizer: Any
    ) -> dict[str, Any]:
        """Make one expert's parameters, [1, ...], from what `read_one` returns."""
        lists = {p: [t if len(self.sources[p]) > 1 else t[None]] for p, t in tensors.items()}
        return self._convert(lists, model, config, quantizer)

    def _cast(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.dtypes[key]
        return tensor if dtype is None else tensor.to(dtype)

    def _convert(
        self, tensors: dict[str, list[torch.Tensor]], model: nn.Module, config: Any, quantizer: Any
    ) -> dict[str, Any]:
        if self.converter is None:
            [[tensor]] = tensors.values()
            return {self.target: tensor}
        converter = copy.copy(self.converter)
        # The loader collects callables, called when the conversion starts.
        converter.collected_tensors = defaultdict(
            list, {p: [lambda t=t: t for t in ts] for p, ts in tensors.items()}
        )
        made = converter.convert(self.target, model=model, config=config, hf_quantizer=quantizer)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def group_keys(loading: Loading, infos: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Return the recipe of each parameter that the file keys `infos` make, by (first) target name.

    Follows transformers' `convert_and_load_state_dict_in_model` step by step: sort, rename, keep a
    key whose own name is a parameter, collect by converter. Keys that make nothing are left out.
    """
    model = loading.model
    state_dict = model.state_dict()
    prefix = model.base_model_prefix
    # Matching marks a transform as used, and some are stateful: the load itself needs them fresh.
    mapping = copy.deepcopy(loading.config.weight_mapping or [])
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}

    recipes: dict[str, Recipe] = {}
    for key in sorted(infos, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state_dict)
        if target not in state_dict and key in state_dict:
            target, pattern = rename_source_key(key, [], [], prefix, state_dict)
        if target not in state_dict:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        recipe = recipes.setdefault(target, Recipe(target, converter))
        recipe.sources[pattern if pattern is not None else key].append(key)
        recipe.dtypes[key] = _cast_dtype(loading, recipe, key, infos[key], state_dict[target].dtype)
    return recipes


_EXPERT_DIM = 0


def _treats_experts_alike(operation: Any) -> bool:
    """Whether the operation on [1, ...] slices gives the slice of the operation on [experts, ...].

    True of operations that stack experts along dimension 0 or work on later dimensions only, and of
    dequantisation, which works on each matrix by itself.
    """
    name = type(operation).__name__
    if name in ("Fp8Dequantize", "Mxfp4Dequantize"):
        return True
    if name == "MergeModulelist":
        return bool(operation.dim == _EXPERT_DIM)
    if name in ("Concatenate", "Chunk", "Split", "Interleave"):
        return bool(operation.dim > _EXPERT_DIM)
    if name == "Transpose":
        return bool(min(operation.dim0, operation.dim1) > _EXPERT_DIM)
    return False


def _cast_dtype(
    loading: Loading, recipe: Recipe, key: str, info: TensorInfo, parameter: torch.dtype
) -> torch.dtype | None:
    """The dtype the loader casts a file tensor to before it is converted; None keeps the file's."""
    dtype = parameter
    for pattern, planned in (loading.config.dtype_plan or {}).items():
        if re.search(pattern.replace("*", ".*"), recipe.target):
            dtype = planned
            break
    quantizer = loading.config.hf_quantizer
    if quantizer is None or not quantizer.pre_quantized:
        return dtype
    if hasattr(quantizer, "get_new_dtype"):
        new = quantizer.get_new_dtype(recipe.converter, info, dtype)
        return new if new is None or isinstance(new, torch.dtype) else dtype
    # transformers before 5.20 keeps whatever is renamed or isn't a float as it lies in the file.
    kept = key != recipe.target or not info.format_dtype.startswith(("F", "BF"))
    return None if kept else dtype

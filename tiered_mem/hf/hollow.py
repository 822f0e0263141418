"""Models whose Experts modules have no parameters: the runtime supplies them, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from tiered_mem.errors import ConfigError
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.detect import ExpertsModule, find_experts, require_experts
from tiered_mem.hf.layout import ExpertLayout, per_expert_tensors
from tiered_mem.hf.loading import Loading, intercept_loading
from tiered_mem.hf.quantised import tell_of_conversions

__all__ = ["ExpertsModule", "find_experts", "hollow_experts", "hollow_model"]


@contextmanager
def hollow_experts(*, keep_stored: bool = True) -> Iterator[list[Checkpoint]]:
    """Load models without their experts: every `from_pretrained` of this thread inside the block.

    Such a model has all its other weights. Its Experts modules have no parameter, but a stand-in on
    meta for each, their `ExpertLayout` as `tiered_layout`, their number as `tiered_layer` and the
    `Origin` of each stand-in as `tiered_origins`.
    Expert tensors are neither allocated nor read. Yields the list of the checkpoints loaded so far,
    one for each model, to read experts from. `keep_stored` is that of `Checkpoint`.

    Blocks may be nested and models loaded in several threads (they take turns, because transformers
    itself sets process-wide state while it builds a model); loads outside a block stay as they are.

    Raises, from `from_pretrained`, before any tensor is read:
        UnsupportedModelError: no experts, or experts outside transformers' experts interface.
        ConfigError: a device_map that leaves weights on disk.
        CheckpointError: a checkpoint that isn't safetensors, is incomplete, or doesn't fit.
    """
    checkpoints: list[Checkpoint] = []

    def load(loading: Loading, resume: Callable[[dict[str, Any] | None], Any]) -> Any:
        if any(hasattr(module, "tiered_layout") for module in loading.model.modules()):
            return resume(loading.state_dict)  # more weights (an adapter) for a hollow model
        if "disk" in (loading.config.device_map or {}).values():
            raise ConfigError(
                "device_map leaves weights on disk; with hollow experts the rest has to "
                "be in memory: give a device_map without 'disk', or none"
            )
        checkpoint = Checkpoint(loading, keep_stored=keep_stored)
        tell_of_conversions(checkpoint.layouts, checkpoint.dtype)
        for name, layer in checkpoint.layer_of.items():
            _hollow(loading.model.get_submodule(name), layer, checkpoint.layouts[layer])
            _untie(loading.model, name)
        result = resume(_lazy_slices(checkpoint.other_files))
        checkpoints.append(checkpoint)
        return result

    with intercept_loading(load):
        yield checkpoints


def hollow_model(model: PreTrainedModel) -> Iterator[tuple[ExpertsModule, ExpertLayout]]:
    """Yield each Experts module of a model in memory with its layout; at the end, hollow them all.

    While it is yielded a module still has its parameters (`layout.copy_expert` copies them). They
    are dropped only once the caller has gone through all modules, so a caller that fails on the way
    leaves the model whole. Raises `UnsupportedModelError` before the first.
    """
    found = [(e, ExpertLayout.of_module(e.module)) for e in require_experts(model)]
    yield from found
    for experts, layout in found:
        _hollow(experts.module, experts.layer, layout)


class Origin(NamedTuple):
    """What a tensor of an Experts module was before the module was hollowed."""

    is_parameter: bool
    requires_grad: bool


def _hollow(module: nn.Module, layer: int, layout: ExpertLayout) -> None:
    origins: dict[str, Origin] = {}
    for name, tensor in per_expert_tensors(module).items():
        origins[name] = Origin(name in module._parameters, tensor.requires_grad)
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        # Some models initialise their experts from outside. They find a plain attribute (no
        # parameter, no bytes) that says it is done.
        stand_in = torch.empty_like(tensor, device="meta")
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, name, stand_in)
    module.tiered_origins = origins  # type: ignore[assignment]
    module.tiered_layout = layout  # type: ignore[assignment]
    module.tiered_layer = layer  # type: ignore[assignment]
    module._is_hf_initialized = True  # type: ignore[assignment]


def _untie(model: PreTrainedModel, name: str) -> None:
    """Take a hollow module's parameters off the list of weights to tie."""
    ties = model.all_tied_weights_keys
    for parameter in [key for key in ties if key.rpartition(".")[0] == name]:
        del ties[parameter]


def _lazy_slices(files: dict[str, str]) -> dict[str, Any]:
    """Return a safetensors slice for each key: transformers reads it when it places the tensor."""
    opened = {path: safe_open(path, framework="pt") for path in set(files.values())}
    return {key: opened[path].get_slice(key) for key, path in files.items()}  # type: ignore[no-untyped-call]

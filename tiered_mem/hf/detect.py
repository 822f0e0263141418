"""Which modules of a transformers model are experts behind its experts interface."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from tiered_mem.errors import NoExpertsError, UnsupportedModelError
from tiered_mem.hf.layout import per_expert_tensors

# What the class names of mixture-of-experts parts end in.
_MOE_CLASS = re.compile(r"(Experts?|M[Oo][Ee]|M[Oo][Ee](Block|Layer|MLP)|SparseMLP)$")


class ExpertsModule(NamedTuple):
    """An Experts module, its name in the model, and its number among them in forward order.

    Modules that share their weights (an encoder's tied to a decoder's) share their number.
    """

    name: str
    module: nn.Module
    layer: int


def experts_interface(module: nn.Module) -> ExpertsInterface | None:
    """Return the interface through which the module's forward dispatches, or None.

    Accepting an `experts_implementation` proves nothing (llama4 does and never calls it): what
    counts is that `use_experts_implementation` wrapped this class's forward.
    """
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:
        return None
    cell = forward.__closure__[code.co_freevars.index("experts_interface")]  # type: ignore[index]
    return cell.cell_contents if isinstance(cell.cell_contents, ExpertsInterface) else None


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """Return the model's Experts modules in forward order, with or without parameters.

    Empty if the model has none.
    """
    experts = []
    layers: dict[tuple[int, ...], int] = {}
    for name, module in model.named_modules():
        if experts_interface(module) is not None:
            layer = getattr(module, "tiered_layer", None)
            if layer is None:
                weights = tuple(id(t) for t in per_expert_tensors(module).values())
                layer = layers.setdefault(weights or (id(module),), len(layers))
            experts.append(ExpertsModule(name, module, layer))
    return experts


def require_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """Return `find_experts(model)`, for a model that still has its expert parameters (maybe meta).

    Raises:
        UnsupportedModelError: the model has no experts, keeps them outside the experts interface,
            or runs them by kernels of its own (quantised experts).
    """
    kind = f"model type {model.config.model_type!r} ({type(model).__name__})"
    experts = find_experts(model)
    if not experts:
        for name, module in model.named_modules():
            if type(module).__name__ == "Mxfp4GptOssExperts":
                raise _computes_quantised(kind, name, module)
        parts = sorted({type(m).__name__ for m in model.modules() if _is_moe_part(m)})
        if parts:
            raise UnsupportedModelError(
                f"{kind} keeps its experts ({', '.join(parts)}) outside transformers' experts "
                "interface, so its experts can't be moved one by one; load it with plain "
                "from_pretrained, or with accelerate's device_map to offload whole layers"
            )
        raise NoExpertsError(
            f"{kind} is not a mixture of experts: there are no experts to offload; load it with "
            "plain from_pretrained, with kv=... to tier its keys and values, or with accelerate's "
            "device_map to offload whole layers"
        )
    for name, module, _ in experts:
        if experts_interface(module) is not ALL_EXPERTS_FUNCTIONS:
            raise _computes_quantised(kind, name, module)
        if not per_expert_tensors(module):
            raise UnsupportedModelError(f"{kind} has no parameter per expert in {name}")
    return experts


def _computes_quantised(kind: str, name: str, module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{kind} runs quantised experts ({type(module).__name__} at {name}) by kernels of its own, "
        "which take a layer's experts together; load the checkpoint without quantization_config "
        "(fp8 and mxfp4 experts then stay quantised in every tier), or dequantise it on load: pass "
        "quantization_config with dequantize=True"
    )


def _is_moe_part(module: nn.Module) -> bool:
    return _MOE_CLASS.search(type(module).__name__) is not None and not isinstance(
        module, PreTrainedModel
    )

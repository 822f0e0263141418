"""Where a model's other weights may be: with no backend for another device, on the host."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from tiered_mem.errors import ConfigError

# What device_map says when it leaves the choice to accelerate: the accelerators first.
_CHOSEN_FOR_US = {"auto", "balanced", "balanced_low_0", "sequential"}


def require_host_device_map(device_map: Any) -> None:
    """Raise `ConfigError` if a `device_map` as transformers takes it places weights off the host.

    Without one, weights go to torch's default device.
    """
    if device_map is None:
        device_map = torch.get_default_device()
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        chosen = place in _CHOSEN_FOR_US and not torch.accelerator.is_available()
        if not chosen and str(place).partition(":")[0] != "cpu":
            raise ConfigError(_off_host(f"device_map places weights on {str(place)!r}"))


def require_host_model(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if a parameter of the model isn't in host memory."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise ConfigError(_off_host(f"{name} is on {str(parameter.device)!r}"))


@functools.cache
def warn_of_unused_gpu() -> None:
    """Warn, once in a process and at the line of the caller's caller, that no GPU is used."""
    if torch.cuda.is_available():
        warnings.warn(
            "tiered-mem has no CUDA backend yet: the model runs on the CPU, and host memory plays "
            "HBM's part",
            stacklevel=3,
        )


def _off_host(what: str) -> str:
    return (
        f"{what}, but tiered-mem has a backend for host memory only (it plays HBM's part): load "
        "the model with device_map='cpu' or none, or move it by .to('cpu')"
    )

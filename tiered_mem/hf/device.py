"""Which device a model's experts belong to, and how they compute there."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tiered_mem.callers import stacklevel
from tiered_mem.device import Backend, backend_for
from tiered_mem.errors import ConfigError, DeviceError
from tiered_mem.hf.grouped import may_have_kernel
from tiered_mem.hf.overrides import Overrides
from tiered_mem.hf.transport import LateUses
from tiered_mem.space import Space

# What device_map says when it leaves the choice to accelerate: the accelerators first.
_CHOSEN_FOR_US = ("auto", "balanced", "balanced_low_0", "sequential")

# Decoding copies the weights of each row of [tokens * k], as the unmodified model does; up to here.
_MOST_SELECTED_NBYTES = 1 << 30


class Way(Enum):
    """How experts are computed: which of transformers' experts functions does the same."""

    GROUPED = "grouped_mm, by a kernel"
    ONE_BY_ONE = "grouped_mm, where torch has no kernel for it"
    BATCHED = "batched_mm"
    EAGER = "eager"

    @property
    def needs_no_ids(self) -> bool:
        """Whether the host needn't know which rows are which expert's."""
        return self in (Way.GROUPED, Way.BATCHED)


class Home:
    """The device of a model's experts: their weights in HBM, and how they compute.

    Args:
        space: of the model, on the runtime of that device.
        stock: the experts implementation that the unmodified model would have.
    """

    def __init__(self, space: Space, stock: str | None) -> None:
        self._space = space
        self._backend = backend = space.runtime.backend
        self._stock = stock
        self._thread = threading.local()
        self.device = backend.device
        self.late = LateUses(backend.device)

    @property
    def uses_pool(self) -> bool:
        """Whether experts compute from the slot pool; on the host they do as blocks arrive."""
        return not (self._backend.in_place and self.device.type == "cpu")

    @property
    def kernels(self) -> Any:
        """What launches the kernels of csrc/kernels.cu; None where there are none."""
        return getattr(self._backend, "kernels", None)

    @property
    def keeps_memory(self) -> bool:
        """Whether views of slots may be kept: HBM is a mapping that stays."""
        return self._backend.in_place

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        """Return memory of HBM as uint8 [nbytes]."""
        view: torch.Tensor = self._space.view(address, nbytes)
        return view

    def span_of(self, address: int) -> tuple[int, int]:
        """Return the bounds of the memory around an address that one tensor may span."""
        if self._backend.in_place:
            return 0, len(self._space.memory)
        return self._backend.span(address)

    def way(self, dtype: torch.dtype, selected_nbytes: int, like_eager: bool) -> Way:
        """Return how to compute with weights of `dtype`.

        `selected_nbytes` is what a copy of each row's weights would take.
        """
        if like_eager:
            return Way.EAGER
        batched = self._stock == "batched_mm" or getattr(self._thread, "decodes", False)
        if batched and selected_nbytes <= _MOST_SELECTED_NBYTES:
            return Way.BATCHED
        return Way.GROUPED if may_have_kernel(self.device, dtype) else Way.ONE_BY_ONE

    def follow_generate(self, overrides: Overrides) -> None:
        """Decode as `generate` of the unmodified model does.

        On accelerators it switches `grouped_mm` to `batched_mm` after the prompt.
        """
        switch = getattr(overrides.model, "_optimize_model_for_decode", None)
        if switch is None or self.device.type == "cpu" or self._stock not in (None, "grouped_mm"):
            return

        @contextmanager
        def decode() -> Iterator[None]:
            before = getattr(self._thread, "decodes", False)
            self._thread.decodes = True
            try:
                with switch():
                    yield
            finally:
                self._thread.decodes = before

        overrides.set("_optimize_model_for_decode", decode)

    def elsewhere(self, device: torch.device) -> ConfigError:
        """Return the error for hidden states on another device."""
        return ConfigError(
            f"hidden states are on {device}, but the experts' runtime is on {self.device}: "
            f"{_HOW_TO_MOVE}"
        )


_HOW_TO_MOVE = (
    "a wrapped model can't be moved; load it with device= the other one, or unwrap() it, move it "
    "and offload() it again"
)


def choose_device(device: Any, device_map: Any) -> tuple[torch.device | None, Any]:
    """Return the device asked for (None: whatever the map says) and the device_map to load with.

    "auto" is torch's accelerator, or the CPU without one. Without either option, weights go to
    torch's default device, as in transformers. Raises `ConfigError`.
    """
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map both say where the model goes: give one of them")
    if device is None and device_map is None:
        return torch.get_default_device(), None
    one = device if device is not None else device_map
    if device is None and isinstance(device_map, Mapping):
        for place in device_map.values():
            _parse(place)
        return None, device_map
    # accelerate would count the experts in, and put on the CPU or disk what needn't go there.
    found = _accelerator() if one in _CHOSEN_FOR_US else _parse(one)
    return found, None if found == torch.get_default_device() else {"": found}


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else _with_index(found)


def _parse(place: Any) -> torch.device:
    if place == "disk":
        raise ConfigError(
            "device_map leaves weights on disk; only experts can be kept there, in the store: give "
            "a device_map without 'disk'"
        )
    if isinstance(place, bool) or not isinstance(place, str | int | torch.device):
        raise ConfigError(f"{place!r} is no device: write cpu or cuda:0")
    if isinstance(place, int) and not torch.accelerator.is_available():
        raise DeviceError(f"there is no device {place}: torch sees no accelerator here; use 'cpu'")
    try:
        return _with_index(torch.device(place))
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{place!r} is no device: {reason}; write cpu or cuda:0") from error


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return torch.device("cpu")
    index: int | None = device.index  # torch's stubs know of no device without one
    if index is not None:
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = accelerator is not None and accelerator.type == device.type
    return torch.device(device.type, torch.accelerator.current_device_index() if here else 0)


def usable(device: torch.device) -> Backend:
    """Return the backend of a device that experts can be on. Raises ConfigError, DeviceError."""
    if device.type == "meta":
        raise ConfigError("experts can't be on 'meta': use 'cpu', or 'cuda'")
    return backend_for(device)


def home_in_map(names: Iterable[str], device_map: Mapping[str, Any]) -> torch.device:
    """Return the device that a device_map puts modules of these names on.

    Others may be elsewhere. Raises `ConfigError` if they are on several, or nowhere.
    """
    found: dict[torch.device, str] = {}
    for name in names:
        parts = name.split(".")
        above = (".".join(parts[:i]) for i in range(len(parts), -1, -1))
        place = next((device_map[path] for path in above if path in device_map), None)
        if place is None:
            raise ConfigError(f"device_map names no device for {name}: add one, or '' for the rest")
        found.setdefault(_parse(place), name)
    return _only(found)


def home_of(model: PreTrainedModel, experts: Sequence[tuple[str, nn.Module, int]]) -> torch.device:
    """Return the device of the layers that `experts` (name, module, layer) are in.

    Raises `ConfigError` if those are on several.
    """
    placed: Mapping[str, Any] | None = getattr(model, "hf_device_map", None)
    if placed:
        return home_in_map([name for name, _, _ in experts], placed)
    found: dict[torch.device, str] = {}
    for name, module, _ in experts:
        parameter = next(module.parameters(), None)
        found.setdefault(_with_index(model.device if parameter is None else parameter.device), name)
    return _only(found)


def _only(found: dict[torch.device, str]) -> torch.device:
    if len(found) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in found.items())
        raise ConfigError(
            f"a runtime serves one device, but layers with experts are on several ({places}): give "
            "a device_map that puts all of them on one, such as device_map='cuda:0'"
        )
    return next(iter(found))


def require_one_device(model: PreTrainedModel, device: torch.device) -> None:
    """Raise `ConfigError` if a parameter of a model without a device_map is elsewhere."""
    if getattr(model, "hf_device_map", None):
        return
    for name, parameter in model.named_parameters():
        if _with_index(parameter.device) != device:
            raise ConfigError(
                f"{name} is on {str(parameter.device)!r}, the experts' layers on {str(device)!r}: "
                "move the whole model to one device first, by .to(...)"
            )


def refuse_moves(overrides: Overrides, device: torch.device) -> None:
    """Make a model refuse to be moved off `device`."""
    model = overrides.model

    def refuse(target: torch.device) -> None:
        if _with_index(target) != device:
            raise ConfigError(f"the model's experts are on {device}: {_HOW_TO_MOVE}")

    def guard(name: str, target_of: Callable[..., torch.device | None]) -> Callable[..., Any]:
        original = getattr(model, name)

        @functools.wraps(original)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            target = target_of(*args, **kwargs)
            if target is not None:
                refuse(target)
            return original(*args, **kwargs)

        return guarded

    def of_to(*args: Any, **kwargs: Any) -> torch.device | None:
        target: torch.device | None = torch._C._nn._parse_to(*args, **kwargs)[0]
        return target

    def of(kind: str) -> Callable[..., torch.device]:
        def target(device: Any = None) -> torch.device:
            if device is None or isinstance(device, int):
                return torch.device(kind) if device is None else torch.device(kind, device)
            return torch.device(device)

        return target

    ways: dict[str, Callable[..., torch.device | None]] = {"to": of_to, "cpu": of("cpu")}
    ways |= {kind: of(kind) for kind in ("cuda", "xpu", "ipu", "mtia") if hasattr(model, kind)}
    for name, target_of in ways.items():
        overrides.set(name, guard(name, target_of))


@functools.cache
def warn_of_unused_gpu() -> None:
    """Warn, once in a process, that no GPU is used."""
    if torch.accelerator.is_available():
        warnings.warn(
            f"the model goes to the CPU, and host memory plays HBM's part; device='auto' would use "
            f"{_accelerator()}",
            stacklevel=stacklevel(),
        )

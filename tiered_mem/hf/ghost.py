"""Runs a layer's router alone: no experts, no hooks, no state, and no table of families.

A ghost is a copy of a block's module tree that shares every parameter and buffer with the model and
nothing else. Its experts are a recorder that takes what the router chose and leaves the block.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from tiered_mem.hf.top_k import TOP_K_NAMES

Extra = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside its hidden states: positional and keyword arguments."""


class Step(NamedTuple):
    """A module called with one tensor, of whose output (or that element of it) the next is made."""

    module: nn.Module
    element: int | None


class GhostError(Exception):
    """The block can't be run without its experts. Says why; never leaves the package."""


class _Chosen(Exception):
    """Leaves a ghost block. Carries the tensors, so that threads can share a ghost."""

    def __init__(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.ids, self.weights = ids, weights


class _Recorder(nn.Module):
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> NoReturn:
        raise _Chosen(top_k_index, top_k_weights)


class _Skip(nn.Module):
    """Stands for a module whose result the router doesn't need."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class RouterBlock(nn.Module):
    """Stands for the block that a router and its experts lack: the decoder layer calls them.

    `ids` and `weights` say which elements of the router's output go to the experts.
    """

    def __init__(
        self, router: nn.Module, experts: nn.Module, ids: int | None, weights: int | None
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self._ids, self._weights = ids, weights

    def forward(self, hidden_states: torch.Tensor) -> Any:
        chosen = self.router(hidden_states)
        return self.experts(hidden_states, chosen[self._ids], chosen[self._weights])


class Ghost:
    """A layer's way from the residual stream to its router.

    Args:
        steps: what the model applies to the residual stream before the block, in order.
        block: the module that calls router and experts.
        experts: the attribute of `block` that holds the experts.

    `calibrate` once with a real call before `route`.
    """

    def __init__(self, steps: Sequence[Step], block: nn.Module, experts: str) -> None:
        self._real = [*(step.module for step in steps), block]
        self._experts = experts
        self._steps = [Step(_shadow(step.module), step.element) for step in steps]
        self._block = _shadow(block, {experts: _Recorder()})
        self.num_ranked = 0

    def calibrate(self, residual: torch.Tensor, extra: Extra, top_k_index: torch.Tensor) -> None:
        """Check the ghost against what its layer really did, then make it rank 2k experts.

        Modules that the router doesn't need (shared experts) are skipped from then on. Where 2k
        can't be had, it ranks k.

        Args:
            residual: what its first step (without steps: its block) was called with.
            extra: what the block was called with beside the normed hidden states.
            top_k_index: [tokens, k], what its router chose.

        Raises:
            GhostError: the router chose otherwise, failed, or changed a buffer (put back then).
        """
        before = [(b, b.clone()) for module in self._real for b in module.buffers()]
        try:
            truth = self.route(residual, extra)
        except GhostError:
            raise
        except Exception as error:
            raise GhostError(f"its router doesn't run alone: {error!r}") from error
        finally:
            changed = [b.copy_(old) for b, old in before if not torch.equal(b, old)]
        if changed:
            raise GhostError("its router keeps statistics in its buffers")
        if not _same_choice(truth[0], top_k_index):
            raise GhostError("its router chooses otherwise when run alone")
        self._skip_unneeded(residual, extra, truth)
        self._widen(residual, extra, top_k_index)

    def route(self, residual: torch.Tensor, extra: Extra) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids [tokens, up to 2k] and weights that the router gives this residual."""
        args, kwargs = extra
        hidden_states = residual
        for module, element in self._steps:
            output = module.forward(hidden_states)
            hidden_states = output if element is None else output[element]
        try:
            self._block.forward(hidden_states, *args, **kwargs)
        except _Chosen as chosen:
            return chosen.ids, chosen.weights
        raise GhostError("its block doesn't call its experts")

    def _skip_unneeded(
        self, residual: torch.Tensor, extra: Extra, truth: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        children = self._block._modules
        for name, child in list(children.items()):
            if name == self._experts or child is None:
                continue
            children[name] = _Skip()
            try:
                ids, weights = self.route(residual, extra)
                needed = not (torch.equal(ids, truth[0]) and torch.equal(weights, truth[1]))
            except Exception:
                needed = True
            if needed:
                children[name] = child

    def _widen(self, residual: torch.Tensor, extra: Extra, top_k_index: torch.Tensor) -> None:
        k = top_k_index.shape[-1]
        narrow, self.num_ranked = self._block, k
        num_experts = getattr(self._real[-1].get_submodule(self._experts), "num_experts", None)
        wide = min(2 * k, num_experts) if isinstance(num_experts, int) else 2 * k
        self._block = _shadow(narrow, {self._experts: narrow.get_submodule(self._experts)})
        for module in self._block.modules():
            _replace_top_k(module.__dict__, k, wide)
            if "config" in module.__dict__:  # read at each call by some routers
                config = module.__dict__["config"] = copy.copy(module.__dict__["config"])
                _replace_top_k(config.__dict__, k, wide)
        try:
            ids, _ = self.route(residual, extra)
            is_wide = ids.shape == (*top_k_index.shape[:-1], wide)
            if is_wide and (top_k_index[..., None] == ids[..., None, :]).any(-1).all():
                self.num_ranked = wide
                return
        except Exception:  # this router's k stands elsewhere
            pass
        self._block = narrow


def _shadow(module: nn.Module, replace: dict[str, nn.Module] | None = None) -> nn.Module:
    """Copy the module tree. Parameters and buffers are shared as dicts, so `.to()` reaches it.

    Hooks stay behind, and a `forward` set on an instance too (accelerate's calls the original).
    """
    shadow: nn.Module = object.__new__(type(module))
    state = dict(module.__dict__)
    for name in state:
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            state[name] = OrderedDict()
    state.pop("forward", None)
    state["training"] = False  # no dropout, no jitter: the random number generator stays as it is
    replace = replace or {}
    state["_modules"] = {
        name: replace[name] if name in replace else child if child is None else _shadow(child)
        for name, child in module._modules.items()
    }
    shadow.__dict__.update(state)
    return shadow


def _replace_top_k(attributes: dict[str, Any], k: int, wide: int) -> None:
    for name in TOP_K_NAMES:
        if attributes.get(name) == k:
            attributes[name] = wide


def _same_choice(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return torch.equal(one.sort(-1).values.to(other.dtype), other.sort(-1).values)

"""Experts computed from the slot pool, in the ways of transformers' experts functions.

Three ways, each the arithmetic of a stock function on the same device:

- `by_groups`: one grouped matmul for each window of slots (`grouped_mm` where torch has a kernel
  for it). A row's result doesn't depend on the rows and groups beside it.
- `one_by_one`: a matmul for each expert. That is what `grouped_mm` does where torch has no such
  kernel (torch's own fallback), but for the host synchronisations: here the host knows the counts.
- `Selection`: a copy of each row's weights and one batched matmul (`batched_mm`), what `generate`
  switches to for decoding on accelerators.

Nothing here waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.integrations.moe import _batched_linear, _grouped_linear

from tiered_mem.device.kernels import MAX_SLOTS, remap_ids
from tiered_mem.hf.pool import Views

# NVIDIA GPUs, by the first figure of their compute capability, for which torch 2.9 to 2.13 has no
# grouped matmul of its own.
_WITHOUT_KERNEL = (5, 6, 7, 8, 12)


def may_have_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped matmul may be one kernel here; if not, it is its fallback for sure.

    Where this says so wrongly, results are right and the fallback waits for the host.
    """
    if dtype != torch.bfloat16 or device.type == "cpu":
        return False
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device)[0] not in _WITHOUT_KERNEL


class Rows(NamedTuple):
    """The rows of [tokens * k] sorted by the group that computes them, on the device."""

    order: torch.Tensor  # int64 [rows]; those that no group computes come last
    groups: torch.Tensor  # of each, ascending; the number of groups for none
    ends: torch.Tensor  # int32 [groups], of each group in that order
    inverse: torch.Tensor | None = None  # of `order`, where it is known

    def places(self) -> torch.Tensor:
        """Return where each row has come to stand, int64 [rows]."""
        if self.inverse is not None:
            return self.inverse
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places


def sort_rows(ids: torch.Tensor, table: torch.Tensor, num_groups: int, kernels: Any = None) -> Rows:
    """Sort rows by group on their device: by one launch of `kernels`, if the backend has them.

    Args:
        ids: expert of each row, int64 [rows]; from `len(table) - 1` up they are nobody's.
        table: group of each expert and, last, of nobody, int32; `num_groups` for none.
    """
    if kernels is not None and num_groups <= MAX_SLOTS and ids.dtype == torch.int64:
        found = remap_ids(kernels, ids, table, num_slots=num_groups)
        groups = torch.where(found.slots < 0, num_groups, found.slots)
        return Rows(found.order, groups, found.offs, found.inverse)
    groups, order = torch.sort(table[ids.clamp(max=len(table) - 1)], stable=True)
    numbers = torch.arange(num_groups, dtype=torch.int32, device=ids.device)
    return Rows(order, groups, torch.searchsorted(groups, numbers, right=True, out_int32=True))


def by_groups(
    module: Any, views: Views, states: torch.Tensor, groups: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Apply experts to rows that are sorted by group.

    Args:
        module: the Experts module.
        views: its weights, [groups, ...] each.
        states: [rows, hidden].
        groups: of each row.
        ends: of each group among the rows; those beyond the last end are left as they come.
    """

    def linear(name: str, inputs: torch.Tensor) -> torch.Tensor:
        bias = views[name + "_bias"][groups] if module.has_bias else None
        out: torch.Tensor = _grouped_linear(
            inputs, views[name], ends, bias=bias, is_transposed=module.is_transposed
        )
        return out

    return _expert(module, linear, states)


def one_by_one(
    module: Any, experts: Sequence[Views], counts: Sequence[int], states: torch.Tensor
) -> torch.Tensor:
    """Apply experts to rows [rows, hidden] that are sorted by them, `counts` rows for each."""

    ends = list(itertools.accumulate(counts))
    places = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def linear(name: str, inputs: torch.Tensor) -> torch.Tensor:
        weights = [views[name] if module.is_transposed else views[name].T for views in experts]
        inputs = inputs.to(weights[0].dtype)
        out = inputs.new_empty(inputs.size(0), weights[0].size(1))
        for weight, rows in zip(weights, places, strict=True):
            torch.mm(inputs[rows], weight, out=out[rows])
        if module.has_bias:
            for views, rows in zip(experts, places, strict=True):
                out[rows].add_(views[name + "_bias"])
        return out

    return _expert(module, linear, states)


class Selection:
    """The weights of each row, copied as they arrive, for one batched matmul when all are there."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._selected: Views = {}

    def add(self, rows: Sequence[int], experts: Sequence[Views]) -> None:
        """Copy the weights of some rows: `experts` has an expert for each."""
        for name in experts[0]:
            found = [views[name] for views in experts]
            if len(rows) == self._num_rows:
                order = sorted(range(len(rows)), key=rows.__getitem__)
                self._selected[name] = torch.stack([found[i] for i in order])
                continue
            if name not in self._selected:  # rows that are nobody's stay at zero
                shape = (self._num_rows, *found[0].shape)
                self._selected[name] = found[0].new_zeros(shape)
            for row, weight in zip(rows, found, strict=True):
                self._selected[name][row].copy_(weight)

    @classmethod
    def of(cls, views: Views, groups: torch.Tensor) -> Selection:
        """Select the weights of each row's group."""
        selection = cls(groups.numel())
        selection._selected = {name: weights[groups] for name, weights in views.items()}
        return selection

    def apply(self, module: Any, states: torch.Tensor) -> torch.Tensor:
        """Apply each row's expert to it, [rows, hidden] -> [rows, hidden]."""

        def linear(name: str, inputs: torch.Tensor) -> torch.Tensor:
            bias = self._selected[name + "_bias"] if module.has_bias else None
            out: torch.Tensor = _batched_linear(
                inputs, self._selected[name], bias=bias, is_transposed=module.is_transposed
            )
            return out

        return _expert(module, linear, states)


def _expert(module: Any, linear: Any, states: torch.Tensor) -> torch.Tensor:
    inner = linear("gate_up_proj" if module.has_gate else "up_proj", states)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    result: torch.Tensor = linear("down_proj", inner)
    return result

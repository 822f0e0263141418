"""The experts function: stock experts modules whose weights are where the runtime puts them.

Registered in transformers' experts interface. The formula is the interface's own (up, gate or
activation, down, optional norm, router weight, sum); only where a weight comes from differs. Sums
are taken in a fixed order whatever the order of arrival, so tokens don't depend on timing:
`tiered` adds like `grouped_mm` (transformers' default), `tiered_eager` like `eager`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from tiered_mem.errors import RuntimeClosedError, TieredMemError, UnsupportedModelError
from tiered_mem.hf import pooled
from tiered_mem.hf.device import Home
from tiered_mem.hf.layout import ExpertLayout, Views
from tiered_mem.hf.pool import MOST_GROUPS, Groups, group
from tiered_mem.hf.pooled import one_expert
from tiered_mem.hf.prefetch import RouterHooks
from tiered_mem.space import Space

if TYPE_CHECKING:
    from tiered_mem.hf.record import Recorder

IMPLEMENTATIONS = {
    None: "tiered",
    "grouped_mm": "tiered",
    "batched_mm": "tiered",
    "eager": "tiered_eager",
}


class TieredExperts:
    """What an experts module needs to find its weights: set as its attribute `tiered`."""

    def __init__(
        self,
        space: Space,
        layer: int,
        layout: ExpertLayout,
        hooks: RouterHooks | None,
        home: Home,
    ) -> None:
        self.space = space
        self.layer = layer
        self.layout = layout
        self.hooks = hooks
        self.home = home
        self.recorder: Recorder | None = None
        self.resident: pooled.Resident | None = None
        self.dtype = max(layout.fields, key=lambda field: field.nbytes).dtype
        self._views: dict[int, Views] = {}

    def weights(self, slot: int) -> Views:
        """Return the weights of the expert in a slot, as the module's parameters for one expert."""
        views = self._views.get(slot)
        if views is None:
            views = self.layout.views(self.home.view(slot, self.layout.nbytes))
            if self.home.keeps_memory:
                self._views[slot] = views
        return self.layout.weights(views)

    def group(self, slots: Sequence[int]) -> Groups:
        """Cover slots with windows: the weight tensors of a grouped matmul."""
        return group(slots, self.layout.slot_nbytes, self.home.span_of, MOST_GROUPS)

    def __reduce__(self) -> Any:
        raise TieredMemError(
            "a model with tiered experts can't be pickled or copied; close it with "
            "model.tiered_mem.unwrap() first, or load it again in the other process"
        )


class _NoBackward(torch.autograd.Function):
    """Passes the output on, and refuses a backward pass: the weights may be gone by then."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> Any:
        raise UnsupportedModelError(
            "tiered experts can't be trained: their weights may have left HBM before the backward "
            "pass; train the model unwrapped (model.tiered_mem.unwrap())"
        )


def tiered_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Experts function that sums like transformers' `grouped_mm`.

    Takes hidden states [tokens, hidden], expert ids and router weights [tokens, k]; returns
    [tokens, hidden]. Raises `RuntimeClosedError`, `TransferError`, `ChecksumError`.
    """
    return _forward(self, hidden_states, top_k_index, top_k_weights, like_eager=False)


def tiered_eager_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Experts function that adds like transformers' eager loop over the experts."""
    return _forward(self, hidden_states, top_k_index, top_k_weights, like_eager=True)


def _forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    like_eager: bool,
) -> torch.Tensor:
    if hidden_states.size(0) == 0:
        return torch.zeros_like(hidden_states)
    tiered: TieredExperts | None = getattr(module, "tiered", None)
    if tiered is None:
        raise RuntimeClosedError(
            "this model's experts were given back by close(): load the model again to use it"
        )
    if hidden_states.device != tiered.home.device:
        raise tiered.home.elsewhere(hidden_states.device)
    run = pooled.run if tiered.home.uses_pool else _run_on_arrival
    with torch.no_grad():
        outputs = run(module, hidden_states, top_k_index, top_k_weights, like_eager)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)  # type: ignore[operator]
        sum_up = _sum_like_eager if like_eager else _sum_like_grouped_mm
        result = sum_up(outputs, hidden_states, top_k_index, top_k_weights)
    if hidden_states.requires_grad or top_k_weights.requires_grad:
        return _NoBackward.apply(result, hidden_states, top_k_weights)  # type: ignore[no-any-return, no-untyped-call]
    return result


def _run_on_arrival(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    by_rank: bool,
) -> torch.Tensor:
    """Return each token's output of each of its experts, [tokens * k, hidden].

    On the host: each expert is computed on when its block has arrived.
    """
    tiered: TieredExperts = module.tiered  # type: ignore[assignment]
    num_top_k = top_k_index.size(-1)
    ids, rows = _group(top_k_index, module.num_experts, by_rank)  # type: ignore[arg-type]
    outputs: torch.Tensor | None = None
    recorder = tiered.recorder
    if recorder is not None:
        recorder.start()
    with tiered.space.begin(tiered.layer, ids) as reading:
        if tiered.hooks is not None:
            # After this layer's own reads have started, so that predicting overlaps with them.
            tiered.hooks.on_route(tiered.layer, top_k_index)
        for position, slot in reading:
            mine = rows[position]
            states = hidden_states if mine is None else hidden_states[mine // num_top_k]
            output = one_expert(module, tiered.weights(slot), states)
            if outputs is None:
                outputs = output.new_zeros(top_k_index.numel(), output.size(-1))
            # With one token the position is the row: experts are in the router's order.
            if mine is None:
                outputs[position] = output[0]
            else:
                outputs[mine] = output
    if recorder is not None:
        recorder.finish(tiered.layer, ids, top_k_index, top_k_weights)
    return outputs if outputs is not None else hidden_states.repeat_interleave(num_top_k, 0) * 0


def _group(
    top_k_index: torch.Tensor, num_experts: int, by_rank: bool
) -> tuple[list[int], list[torch.Tensor] | list[None]]:
    """Return the distinct experts and, for each, the rows of [tokens * k] that it computes.

    With one token whose experts are distinct a row is a position: None. Ids from `num_experts` up
    are expert-parallel sentinels: nothing is computed for them.

    An expert's rows come by token, as in `grouped_mm`, or `by_rank` in the router's choice and then
    by token, as in `eager`: vectorised kernels round the last rows of a tensor in another way.
    """
    if top_k_index.size(0) == 1:
        ids = top_k_index[0].tolist()
        if len(set(ids)) == len(ids) and max(ids) < num_experts:
            return ids, [None] * len(ids)
    order = torch.sort((top_k_index.T if by_rank else top_k_index).reshape(-1), stable=True)
    found, counts = torch.unique_consecutive(order.values, return_counts=True)
    indices = order.indices
    if by_rank:  # from places in [k, tokens] to rows
        num_tokens, num_top_k = top_k_index.shape
        indices = indices % num_tokens * num_top_k + indices // num_tokens
    ids = found.tolist()
    rows = list(torch.split(indices, counts.tolist()))
    valid = sum(i < num_experts for i in ids)
    return ids[:valid], rows[:valid]


def _sum_like_grouped_mm(
    outputs: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    weighted = outputs * top_k_weights.reshape(-1, 1)
    summed = weighted.view(*top_k_index.shape, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _sum_like_eager(
    outputs: torch.Tensor,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    weighted = (outputs * top_k_weights.reshape(-1, 1)).to(hidden_states.dtype)
    total = torch.zeros_like(hidden_states)
    # One addition per expert in ascending order, because rounding depends on the order.
    order = torch.sort(top_k_index.reshape(-1), stable=True)
    _, counts = torch.unique_consecutive(order.values, return_counts=True)
    for rows in torch.split(order.indices, counts.tolist()):
        total.index_add_(0, rows // top_k_index.size(-1), weighted[rows])
    return total


ExpertsInterface.register("tiered", tiered_forward)
ExpertsInterface.register("tiered_eager", tiered_eager_forward)

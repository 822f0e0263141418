"""Experts on a device: computed from the slot pool, by ids that are remapped to slots.

The host learns the router's ids once an event (one wait for the device), because what is missing
has to be moved. Where every expert of a layer is resident nothing is missing: the host doesn't
wait, and what was used is told late. All else is queued on the device: a wave's blocks are computed
on in the batches in which they become ready, while the next ones are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from tiered_mem.hf import grouped
from tiered_mem.hf.device import Way
from tiered_mem.hf.grouped import Rows, Selection
from tiered_mem.hf.pool import Groups, Views, window_views
from tiered_mem.hf.prefetch import Seen
from tiered_mem.hf.transport import to_device, to_host

if TYPE_CHECKING:
    from tiered_mem.hf.experts import TieredExperts

# Up to so many rows the host sorts them: it takes less than the launches it saves.
_FEW_ROWS = 1024
# Quantised experts become weights so many at a time.
_NUM_AT_ONCE = 16

Ids = npt.NDArray[np.int64]


def run(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    like_eager: bool,
) -> torch.Tensor:
    """Return each token's output of each of its experts, [tokens * k, hidden]."""
    tiered: TieredExperts = module.tiered  # type: ignore[assignment]
    layout, recorder, hooks = tiered.layout, tiered.recorder, tiered.hooks
    dtype = hidden_states.dtype if layout.quantised else tiered.dtype
    way = tiered.home.way(dtype, top_k_index.numel() * layout.nbytes, like_eager)
    by_windows = way.needs_no_ids and not layout.quantised
    if by_windows and recorder is None and not (hooks and hooks.follows(tiered.layer)):
        outputs = _all_resident(module, tiered, hidden_states, top_k_index, way)
        if outputs is not None:
            return outputs
    seen = Seen() if hooks is None else hooks.look(tiered.layer, top_k_index)
    host_index, *ahead = to_host([top_k_index, *seen.ahead])
    if recorder is not None:
        recorder.start()
    event = _Event(module, tiered, hidden_states, top_k_index, host_index, way)
    with tiered.space.begin(tiered.layer, event.ids) as reading:
        if hooks is not None:
            hooks.predict(seen, host_index, ahead)
        for positions, slots in reading.batches():
            event.compute(positions, slots)
        outputs = event.finish()
    if recorder is not None:
        (host_weights,) = to_host([top_k_weights])
        recorder.finish(tiered.layer, event.ids, host_index, host_weights)
    return outputs


class _Event:
    """A layer step whose ids the host knows. Its blocks come in batches."""

    def __init__(
        self,
        module: Any,
        tiered: TieredExperts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        host_index: torch.Tensor,
        way: Way,
    ) -> None:
        self._module = module
        self._tiered, self._hidden, self._way = tiered, hidden_states, way
        self._num_top_k = top_k_index.size(-1)
        self._rows = top_k_index.reshape(-1)
        self._host_rows: Ids = host_index.numpy().reshape(-1).astype(np.int64, copy=False)
        num_experts = int(self._module.num_experts)
        # Ids from `num_experts` up are expert-parallel sentinels: nothing is computed for them.
        bounded = np.minimum(self._host_rows, num_experts)
        self._counts = np.bincount(bounded, minlength=num_experts + 1)[:num_experts]
        found = np.flatnonzero(self._counts)
        # Of one token they are in the router's order, which tells policies more.
        in_order = len(found) == len(bounded) and top_k_index.size(0) == 1
        self.ids: list[int] = (self._host_rows if in_order else found).tolist()
        self._outputs: torch.Tensor | None = None
        self._selection = Selection(len(bounded))

    def compute(self, positions: Sequence[int], slots: Sequence[int]) -> None:
        """Queue what depends on these blocks; their slots may be given back after that."""
        ids = [self.ids[position] for position in positions]
        if self._way is Way.BATCHED:
            return self._select(ids, slots)
        if self._way is Way.EAGER:
            return self._like_eager(ids, slots)
        if self._way is Way.GROUPED and not self._tiered.layout.quantised:
            return self._by_windows(ids, slots)
        for i in range(0, len(ids), _NUM_AT_ONCE):
            self._one_by_one(ids[i : i + _NUM_AT_ONCE], slots[i : i + _NUM_AT_ONCE])
        return None

    def finish(self) -> torch.Tensor:
        """Return the outputs, [tokens * k, hidden]; zeros for nobody's rows."""
        if self._way is Way.BATCHED and self.ids:
            inputs = self._hidden.repeat_interleave(self._num_top_k, dim=0)
            return self._selection.apply(self._module, inputs)
        if self._outputs is None:
            return self._hidden.new_zeros(len(self._rows), self._hidden.size(-1))
        return self._outputs

    def _put(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        if self._outputs is None:
            whole = self._counts.sum() == len(self._rows)
            make = out.new_empty if whole else out.new_zeros
            self._outputs = make(len(self._rows), out.size(-1))
        self._outputs[rows] = out

    def _inputs(self, rows: torch.Tensor) -> torch.Tensor:
        return self._hidden[rows // self._num_top_k]

    def _by_windows(self, ids: Sequence[int], slots: Sequence[int]) -> None:
        tiered = self._tiered
        groups = tiered.group(slots)
        rows = self._sort(ids, groups.of_slot, groups.num_groups)
        num_rows = np.zeros(groups.num_groups + 1, np.int64)
        num_rows[np.array(groups.of_slot) + 1] = self._counts[ids]
        starts = num_rows.cumsum()
        first = 0
        for window in groups.windows:
            last = first + window.num_slots
            part = slice(int(starts[first]), int(starts[last]))
            mine, of_row, ends = rows.order[part], rows.groups[part], rows.ends[first:last]
            if first:
                of_row, ends = of_row - first, ends - part.start
            views = window_views(tiered.layout, window, tiered.home.view)
            self._put(
                mine,
                grouped.by_groups(self._module, views, self._inputs(mine), of_row, ends),
            )
            first = last

    def _one_by_one(self, ids: Sequence[int], slots: Sequence[int]) -> None:
        counts = self._counts[ids].tolist()
        rows = self._sort(ids, range(len(ids)), len(ids))
        mine = rows.order[: sum(counts)]
        experts = [self._tiered.weights(slot) for slot in slots]
        inputs = self._inputs(mine)
        if self._way is Way.GROUPED:
            views = {name: torch.stack([e[name] for e in experts]) for name in experts[0]}
            of_row = rows.groups[: len(mine)]
            out = grouped.by_groups(self._module, views, inputs, of_row, rows.ends)
        else:
            out = grouped.one_by_one(self._module, experts, counts, inputs)
        self._put(mine, out)

    def _select(self, ids: Sequence[int], slots: Sequence[int]) -> None:
        rows: list[int] = []
        experts: list[Views] = []
        for index, slot in zip(ids, slots, strict=True):
            weights = self._tiered.weights(slot)
            mine = np.flatnonzero(self._host_rows == index).tolist()
            rows += mine
            experts += [weights] * len(mine)
        self._selection.add(rows, experts)

    def _like_eager(self, ids: Sequence[int], slots: Sequence[int]) -> None:
        # An expert's rows come in the router's choice and then by token, as in the eager loop.
        by_choice = self._host_rows.reshape(-1, self._num_top_k)
        for index, slot in zip(ids, slots, strict=True):
            choice, token = np.nonzero(np.equal(by_choice.T, index))
            rows = to_device(token * self._num_top_k + choice, self._hidden.device)
            weights = self._tiered.weights(slot)
            self._put(rows, one_expert(self._module, weights, self._inputs(rows)))

    def _sort(self, ids: Sequence[int], group_of: Sequence[int], num_groups: int) -> Rows:
        table = np.full(self._module.num_experts + 1, num_groups, np.int32)
        table[ids] = group_of
        device = self._hidden.device
        if len(self._host_rows) > _FEW_ROWS:
            kernels = self._tiered.home.kernels
            return grouped.sort_rows(self._rows, to_device(table, device), num_groups, kernels)
        groups = table[np.minimum(self._host_rows, len(table) - 1)].astype(np.int64)
        order = np.argsort(groups, kind="stable")
        ends = np.searchsorted(groups[order], np.arange(num_groups), side="right")
        both = to_device(np.concatenate([order, groups[order], ends]), device)
        num_rows = len(order)
        return Rows(
            both[:num_rows], both[num_rows : 2 * num_rows], both[2 * num_rows :].to(torch.int32)
        )


# --- every expert of the layer is resident ---


class Resident:
    """Where the experts of a layer lie while all of them are resident, and its tables for that."""

    def __init__(self, slots: Sequence[int], groups: Groups, device: torch.device) -> None:
        self.slots = slots
        self.windows = groups.windows
        self.tables = []
        first = 0
        for window in groups.windows:
            # The last is nobody's, and so are, for this window, the experts of the others.
            table = np.full(len(slots) + 1, window.num_slots, np.int32)
            own = [
                (index, number - first)
                for index, number in enumerate(groups.of_slot)
                if first <= number < first + window.num_slots
            ]
            table[[index for index, _ in own]] = [number for _, number in own]
            self.tables.append(to_device(table, device))
            first += window.num_slots


def _all_resident(
    module: Any,
    tiered: TieredExperts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    way: Way,
) -> torch.Tensor | None:
    event = tiered.space.begin_resident(tiered.layer)
    if event is None:
        return None
    with event:
        slots = event.slots
        resident = tiered.resident
        if resident is None or resident.slots != slots:
            groups = tiered.group(slots)
            resident = tiered.resident = Resident(slots, groups, hidden_states.device)
        tiered.home.late.add(top_k_index, partial(_tell, tiered, module.num_experts))
        ids, num_top_k = top_k_index.reshape(-1), top_k_index.size(-1)
        sort = partial(grouped.sort_rows, kernels=tiered.home.kernels)
        grouped_window = partial(_grouped_window, sort)
        compute = _batched_window if way is Way.BATCHED else grouped_window
        whole = len(resident.windows) == 1 and not _expert_parallel(module)
        outputs: torch.Tensor | None = None
        for window, table in zip(resident.windows, resident.tables, strict=True):
            views = window_views(tiered.layout, window, tiered.home.view)
            out, of_row = compute(module, views, hidden_states, num_top_k, ids, table)
            if whole:
                return out
            # What was computed for others' rows is whatever was there.
            mine = (of_row < window.num_slots)[:, None]
            out = torch.where(mine, out, 0.0)
            outputs = out if outputs is None else torch.where(mine, out, outputs)
        return outputs


def _expert_parallel(module: Any) -> bool:
    """Return whether rows may be nobody's. Before 5.23, transformers' modules don't say."""
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return bool(getattr(module, "_is_expert_parallel", here))


def _grouped_window(
    sort: Callable[..., Rows],
    module: Any,
    views: Views,
    hidden_states: torch.Tensor,
    num_top_k: int,
    ids: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [rows, hidden] and the group of each row; those without one aren't set."""
    num_slots = len(next(iter(views.values())))
    rows = sort(ids, table, num_slots)
    of_row = rows.groups.clamp(max=num_slots - 1) if module.has_bias else rows.groups
    inputs = hidden_states[rows.order // num_top_k]
    out = grouped.by_groups(module, views, inputs, of_row, rows.ends)
    place = rows.places()
    return out[place], rows.groups[place]


def _batched_window(
    module: Any,
    views: Views,
    hidden_states: torch.Tensor,
    num_top_k: int,
    ids: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_slots = len(next(iter(views.values())))
    groups = table[ids.clamp(max=len(table) - 1)]
    selection = Selection.of(views, groups.clamp(max=num_slots - 1))
    return selection.apply(module, hidden_states.repeat_interleave(num_top_k, dim=0)), groups


def _tell(tiered: TieredExperts, num_experts: int, ids: Ids) -> None:
    counts = np.bincount(np.minimum(ids, num_experts), minlength=num_experts + 1)
    tiered.space.note_uses(tiered.layer, np.flatnonzero(counts[:num_experts]).tolist())


# --- one expert alone ---


def one_expert(module: Any, weights: Views, states: torch.Tensor) -> torch.Tensor:
    """Apply one expert to `states`, [rows, hidden] -> [rows, hidden]."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, weights, first, states)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return _linear(module, weights, "down_proj", inner)


def _linear(module: Any, weights: Views, name: str, states: torch.Tensor) -> torch.Tensor:
    weight = weights[name]
    states = states.to(weight.dtype)
    out = states @ weight if module.is_transposed else F.linear(states, weight)
    if module.has_bias:
        # Apart from the product, as the stock functions do: fused, it would round differently.
        out = out.add_(weights[name + "_bias"])
    return out

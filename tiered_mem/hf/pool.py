"""HBM's slots as tensors: the slot pool is the weight tensor.

A grouped matmul takes its weights as one tensor [groups, ...] with a uniform distance from group to
group. Slots of one size lie at multiples of it, so a run of them is such a tensor, whatever lies
in the slots between those that count: groups without rows are never read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tiered_mem.hf.layout import ExpertLayout

#: torch.nn.functional.grouped_mm takes fewer than 1024 groups.
MOST_GROUPS = 1023

Views = dict[str, torch.Tensor]
#: Where the memory around an address that one tensor may span begins and ends.
SpanOf = Callable[[int], tuple[int, int]]


class Window(NamedTuple):
    """Neighbouring slots that one tensor spans: the address of the first, and how many."""

    start: int
    num_slots: int


class Groups(NamedTuple):
    """Windows over some slots. Their slots are numbered through: those are a matmul's groups."""

    windows: list[Window]
    of_slot: list[int]  # group of each slot asked for, in their order

    @property
    def num_groups(self) -> int:
        return sum(window.num_slots for window in self.windows)


def group(
    slots: Sequence[int], slot_nbytes: int, span_of: SpanOf, most: int = MOST_GROUPS
) -> Groups:
    """Cover `slots` (distinct) greedily with windows of at most `most` slots.

    Slots of one window are whole slots apart (one *phase*: address modulo `slot_nbytes`) and lie in
    memory that one tensor may span. Slots that lie in order, one after another, make one window
    whose groups are in that order.
    """
    by_phase: defaultdict[int, list[int]] = defaultdict(list)
    for slot in slots:
        by_phase[slot % slot_nbytes].append(slot)
    windows: list[Window] = []
    group_of: dict[int, int] = {}
    first = 0  # group of the window's first slot
    for phase in sorted(by_phase):
        start, end = 0, 0  # of the window: nothing yet
        last = 0
        for slot in sorted(by_phase[phase]):
            if slot + slot_nbytes > end:
                if end:
                    windows.append(Window(start, last))
                    first += last
                start = slot
                end = min(span_of(slot)[1], start + most * slot_nbytes)
            last = (slot - start) // slot_nbytes + 1
            group_of[slot] = first + last - 1
        windows.append(Window(start, last))
        first += last
    return Groups(windows, [group_of[slot] for slot in slots])


def window_views(
    layout: ExpertLayout, window: Window, view: Callable[[int, int], torch.Tensor]
) -> Views:
    """Return each field of all slots in a window as a tensor [slots, *field.shape]. Copies nothing.

    `view(address, nbytes)` gives memory as uint8. Don't keep the tensors: they may keep memory
    that HBM has given back.
    """
    memory = view(window.start, window.num_slots * layout.slot_nbytes)
    views: Views = {}
    for field in layout.fields:
        itemsize = field.dtype.itemsize
        strides = [1] * len(field.shape)
        for axis in range(len(field.shape) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * field.shape[axis + 1]
        typed = memory.view(field.dtype)
        views[field.name] = typed.as_strided(
            (window.num_slots, *field.shape),
            (layout.slot_nbytes // itemsize, *strides),
            typed.storage_offset() + field.offset // itemsize,
        )
    return views

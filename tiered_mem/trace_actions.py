"""What events do with their blocks, in traces where blocks come and go."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiered_mem.errors import TraceError
from tiered_mem.keys import BlockKey
from tiered_mem.trace_columns import Array, frozen, rank

if TYPE_CHECKING:
    from tiered_mem.trace import Trace


class Action(IntEnum):
    """What an event does. Traces that don't say hold reads alone."""

    READ = 0
    CREATE = 1  # the blocks come into being: in the store, and in HBM without being read
    REMOVE = 2  # the blocks are forgotten


def check_lives(trace: Trace) -> None:
    """Raise `TraceError` unless each block is created first, and removed last, if at all."""
    keys = trace.flat_keys
    order = np.lexsort((np.arange(len(keys)), keys))
    by_block, actions = keys[order], trace.row_action[order]
    begins = np.append(True, by_block[1:] != by_block[:-1])
    ends = np.append(begins[1:], True)
    for action, misplaced, what in (
        (Action.CREATE, ~begins, "created after it was there"),
        (Action.REMOVE, ~ends, "asked for after it was removed"),
    ):
        if (wrong := np.flatnonzero((actions == action) & misplaced)).size:
            row = order[wrong[0]]
            block = BlockKey.unpack(int(keys[row]))
            raise TraceError(f"{trace.name}: row {row}: {block} is {what}")


def most_nbytes(trace: Trace) -> int:
    """Return the most bytes of blocks that were there at once."""
    keys, (distinct, by_block) = trace.flat_keys, trace.blocks
    sizes = by_block[np.searchsorted(distinct, keys)].astype(np.int64)
    changes = np.zeros(len(keys), np.int64)
    firsts = np.unique(keys, return_index=True)[1]
    changes[firsts] = sizes[firsts]
    gone = trace.row_action == Action.REMOVE
    changes[gone] -= sizes[gone]
    return int(changes.cumsum().max())


def columns_of_events(trace: Trace, events: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return the fields of `trace` that differ if only these of its events are left."""
    lengths = trace.event_num_rows
    rows = np.repeat(events, lengths)
    keys = trace.flat_keys[rows]
    distinct = rank(keys)[0]
    sizes = trace.blocks[1][np.searchsorted(trace.blocks[0], distinct)]
    starts = np.append(0, lengths[events].cumsum()[:-1])
    columns: dict[str, Array] = {"event_start": starts.astype(np.uint32), "flat_keys": keys}
    for name in ("row_step", "row_weight", "row_phase", "row_sequence", "row_token"):
        if (column := getattr(trace, name)) is not None:
            columns[name] = column[rows]
    for name in ("gap_seconds", "compute_seconds", "hidden", "action"):
        if (column := getattr(trace, name)) is not None:
            columns[name] = column[events]
    if trace.ahead_offset is not None and trace.ahead_index is not None:
        counts: Array = np.diff(trace.ahead_offset.astype(np.int64))
        columns["ahead_index"] = trace.ahead_index[np.repeat(events, counts)]
        columns["ahead_offset"] = np.append(0, counts[events].cumsum()).astype(np.uint32)
    fields: dict[str, Any] = {name: frozen(column) for name, column in columns.items()}
    return fields | {"blocks": (frozen(distinct), frozen(sizes))}

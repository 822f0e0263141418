"""The columns of a trace: which there are, and what may stand in them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem.errors import TraceError
from tiered_mem.keys import BlockKey, KeyArray, Kind

Array = npt.NDArray[Any]


class Phase(IntEnum):
    """What the model was doing."""

    PREFILL = 0
    DECODE = 1


ROW_COLUMNS: dict[str, type[np.generic]] = {
    "step": np.uint32,
    "layer": np.uint16,
    "kind": np.uint8,
    "index": np.uint32,
    "weight": np.float32,
    "phase": np.uint8,
    "sequence": np.uint32,
}
_LOWEST = {"kind": min(Kind)}
_HIGHEST = {"kind": max(Kind), "phase": max(Phase)}
_SECONDS = ("gap_seconds", "compute_seconds")
EVENT_COLUMNS = (*_SECONDS, "hidden", "ahead_offset", "ahead_index", "event_start", "action")


class Columns:
    """Reads the columns of one trace, which its errors name: `num_rows` values, all in range.

    Every method raises `TraceError`.
    """

    def __init__(self, trace: str, index: npt.ArrayLike) -> None:
        self._trace = trace
        array = np.asarray(index)
        if array.ndim != 1:
            raise TraceError(f"{trace}: index has {array.ndim} dimensions, not one")
        if not array.size:
            raise TraceError(f"{trace}: it holds no access")
        self.num_rows = array.size

    def read(
        self, name: str, values: npt.ArrayLike, dtype: type[np.generic] | None = None
    ) -> Array:
        """Return a column of rows as its dtype; one value stands for all rows."""
        wanted = np.dtype(dtype or ROW_COLUMNS[name])
        array = np.asarray(values)
        if array.ndim > 1 or array.size not in (1, self.num_rows):
            raise TraceError(
                f"{self._trace}: {name} has {array.size} rows, but index has {self.num_rows}"
            )
        array = array.reshape(-1)
        if array.dtype.kind not in ("fiu" if wanted.kind == "f" else "iu"):
            raise TraceError(f"{self._trace}: {name} holds {array.dtype}, not {wanted}")
        if wanted.kind == "f":
            self._check(name, array, np.isfinite(array), "a finite number")
        else:
            lowest, highest = _LOWEST.get(name, 0), _HIGHEST.get(name, np.iinfo(wanted).max)
            if not lowest <= int(array.min()) <= int(array.max()) <= highest:
                fine = (array >= lowest) & (array <= highest)
                self._check(name, array, fine, f"in {lowest} to {highest}")
        return np.broadcast_to(array.astype(wanted, copy=False), self.num_rows)

    def read_sizes(
        self,
        nbytes: npt.ArrayLike | None,
        block_nbytes: npt.ArrayLike | None,
        distinct: KeyArray,
        block_ids: Array,
    ) -> npt.NDArray[np.uint64]:
        """Return the size of each distinct block, from either way to give it."""
        if nbytes is not None and block_nbytes is None:
            sizes = self.read("nbytes", nbytes, np.uint64)
            self._check("nbytes", sizes, (sizes > 0) & (sizes < 1 << 63), "a size in bytes")
            table = np.empty(len(distinct), np.uint64)
            table[block_ids] = sizes
            if (other := np.flatnonzero(table[block_ids] != sizes)).size:
                row, block = other[0], block_ids[other[0]]
                raise TraceError(
                    f"{self._trace}: row {row}: {BlockKey.unpack(int(distinct[block]))} has "
                    f"{sizes[row]} bytes here and {table[block]} elsewhere; a block has one size"
                )
            return table
        if nbytes is not None or block_nbytes is None:
            raise TraceError(f"{self._trace}: it needs the sizes as either nbytes or block_nbytes")
        table = np.asarray(block_nbytes)
        if table.dtype.kind not in "iu" or table.shape != distinct.shape:
            raise TraceError(
                f"{self._trace}: block_nbytes is {table.dtype} {list(table.shape)}, not one size "
                f"for each of {len(distinct)} blocks"
            )
        self._check("block_nbytes", table, (table > 0) & (table < 1 << 63), "a size in bytes")
        return table.astype(np.uint64)

    def read_starts(self, values: npt.ArrayLike, needed: Array) -> Array:
        """Return the first row of each event. `needed`: rows at which one must begin."""
        starts = np.asarray(values)
        if (
            starts.dtype.kind not in "iu"
            or starts.ndim != 1
            or starts.size == 0
            or starts[0] != 0
            or (starts[1:] <= starts[:-1]).any()
            or starts[-1] >= self.num_rows
        ):
            raise TraceError(
                f"{self._trace}: event_start must rise from 0 and stay below {self.num_rows}"
            )
        if (missing := np.setdiff1d(needed, starts)).size:
            raise TraceError(
                f"{self._trace}: row {missing[0]}: no event starts here, but it is of another "
                "sequence, phase, layer or kind than the row before"
            )
        return starts.astype(np.uint32)

    def read_of_events(
        self, given: Mapping[str, npt.ArrayLike], num_events: int
    ) -> dict[str, Array]:
        """Return the optional columns that have one row an event."""
        if unknown := set(given) - set(EVENT_COLUMNS):
            raise TraceError(f"{self._trace}: unknown columns: {', '.join(sorted(unknown))[:200]}")
        columns = {name: np.asarray(values) for name, values in given.items()}
        if (actions := columns.get("action")) is not None:
            if actions.dtype.kind not in "iu" or actions.shape != (num_events,):
                raise TraceError(
                    f"{self._trace}: action is {actions.dtype} {list(actions.shape)}, but there "
                    f"are {num_events} events"
                )
            self._check("action", actions, (actions >= 0) & (actions <= 2), "in 0 to 2")
            columns["action"] = actions.astype(np.uint8)
        for name in {*_SECONDS, "hidden"} & set(columns):
            array, num_dimensions = columns[name], 2 if name == "hidden" else 1
            if array.ndim != num_dimensions or len(array) != num_events or array.dtype.kind != "f":
                raise TraceError(
                    f"{self._trace}: {name} is {array.dtype} {list(array.shape)}, but there are "
                    f"{num_events} events, and it has {num_dimensions} dimensions of floats"
                )
            fine = np.isfinite(array).reshape(num_events, -1).all(axis=1)
            self._check(name, array, fine, "finite")
            if name in _SECONDS:
                self._check(name, array, array >= 0, "a time")
            columns[name] = array.astype(np.float16 if name == "hidden" else np.float32)
        if {"ahead_offset", "ahead_index"} & set(columns):
            columns |= self._read_ahead(columns, num_events)
        return columns

    def _read_ahead(self, columns: Mapping[str, Array], num_events: int) -> dict[str, Array]:
        nothing = np.empty(0, np.uint32)
        offset = columns.get("ahead_offset", nothing)
        index = columns.get("ahead_index", nothing)
        if (
            {offset.dtype.kind, index.dtype.kind} - {"i", "u"}
            or offset.shape != (num_events + 1,)
            or index.ndim != 1
            or offset[0] != 0
            or offset[-1] != len(index)
            or (offset[1:] < offset[:-1]).any()
            or (index.size and not 0 <= int(index.min()) <= int(index.max()) < 1 << 32)
        ):
            raise TraceError(
                f"{self._trace}: ahead_offset must rise in {num_events} + 1 steps from 0 to the "
                "length of ahead_index, and ahead_index must hold ids"
            )
        return {"ahead_offset": offset.astype(np.uint32), "ahead_index": index.astype(np.uint32)}

    def _check(self, name: str, array: Array, fine: Array, wanted: str) -> None:
        if not fine.all():
            row = int(np.flatnonzero(~fine)[0])
            raise TraceError(f"{self._trace}: row {row}: {name} is {array[row]}, not {wanted}")


def rank(keys: KeyArray) -> tuple[KeyArray, npt.NDArray[np.int64]]:
    """Return the distinct keys in order, and where among them each of `keys` is."""
    lowest = keys.min()
    span = int(keys.max() - lowest) + 1
    if span > 4 * len(keys) + 1024:
        return np.unique(keys, return_inverse=True)
    # Close together, as in flat traces of millions: marking beats sorting.
    places = (keys - lowest).astype(np.int64)
    seen = np.zeros(span, bool)
    seen[places] = True
    return np.flatnonzero(seen).astype(np.uint64) + lowest, (seen.cumsum() - 1)[places]


def shorten(column: Array) -> Array:
    """Return the column, or its first row alone if all rows say the same."""
    return column[:1] if (column == column[0]).all() else column


def frozen(array: Array) -> Array:
    """Return a view that can't be written."""
    view = array.view()
    view.setflags(write=False)
    return view

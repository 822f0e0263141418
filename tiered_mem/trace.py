"""Traces: which blocks a model, or a cache, asked for and when.

The file is an npz without pickles. `header` is JSON (see `TraceHeader`), every other array a column
with one row an access, or of length 1 where all rows say the same (`index` is always whole):

    step      uint32  position of the token in its sequence; number of the request
    layer     uint16
    kind      uint8   of `tiered_mem.keys.Kind`
    index     uint32  expert id, or number of the block in its layer
    weight    float32 the router's weight, 0 where there is none
    phase     uint8   of `Phase`
    sequence  uint32
    token     uint32  the token's id (optional)
    block_nbytes  uint64  size of each distinct block, in the order of their packed keys;
                          or instead `nbytes`, with one row an access

Optional columns have one row an *event*: gap_seconds and compute_seconds (float32), hidden
(float16 [num_events, width]), and predictions as ahead_index (uint32) cut by ahead_offset (uint32
[num_events + 1]); where blocks come and go, action (uint8 of `Action`), and event_start (uint32),
the first row of each event.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem.atomic_file import new_file
from tiered_mem.errors import TraceError
from tiered_mem.keys import KeyArray, Kind, pack_keys, unpack_keys
from tiered_mem.trace_actions import Action, check_lives, columns_of_events, most_nbytes
from tiered_mem.trace_columns import (
    EVENT_COLUMNS,
    ROW_COLUMNS,
    Array,
    Columns,
    Phase,
    frozen,
    rank,
    shorten,
)
from tiered_mem.trace_header import Form, TraceHeader, check_against, check_sizes

__all__ = ["Action", "Form", "Phase", "Trace", "TraceHeader"]


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace in memory; its arrays can't be written. Make one by `load` or `from_rows`.

    An event is what is asked for together. By form:
    - events: neighbouring rows of one sequence, phase, layer and kind; in decode of one step as
      well, in prefill up to the row whose step is smaller than the one before;
    - prefix: neighbouring rows of one sequence and step, which is the request;
    - requests: every row.
    `event_start`, in the first form alone, says it instead.
    A block that an event names several times is one access, with the sum of the weights, where it
    came first. Rows keep all of them: row_* and `flat_keys` are [num_rows], `keys`, `nbytes`,
    `weight` and `block_ids` are [num_accesses], event_* are [num_events].
    """

    header: TraceHeader
    name: str
    flat_keys: KeyArray  # packed BlockKeys, in the order of rows
    row_step: Array
    row_weight: Array
    row_phase: Array
    row_sequence: Array
    blocks: tuple[KeyArray, npt.NDArray[np.uint64]]  # distinct keys in order, and their sizes
    row_token: Array | None = None
    gap_seconds: Array | None = None  # compute before the event, since the last was released
    compute_seconds: Array | None = None  # compute inside the event
    ahead_offset: Array | None = None
    ahead_index: Array | None = None  # ranked ids for the next layer, as predicted at this event
    hidden: Array | None = None  # the residual of the last token at the event's router
    event_start: Array | None = None  # rows, where the rule above doesn't tell
    action: Array | None = None  # what each event does; None: all read

    @classmethod
    def from_rows(
        cls,
        header: TraceHeader,
        *,
        index: npt.ArrayLike,
        nbytes: npt.ArrayLike | None = None,
        block_nbytes: npt.ArrayLike | None = None,
        step: npt.ArrayLike = 0,
        layer: npt.ArrayLike = 0,
        kind: npt.ArrayLike = Kind.EXPERT,
        weight: npt.ArrayLike = 0.0,
        phase: npt.ArrayLike = Phase.DECODE,
        sequence: npt.ArrayLike = 0,
        token: npt.ArrayLike | None = None,
        name: str = "",
        **per_event: npt.ArrayLike,
    ) -> Trace:
        """Make a trace of columns: one row an access, or one value for all rows.

        Sizes come as `nbytes` (a column) or `block_nbytes` (of the distinct blocks in the order of
        their packed keys). `per_event` are the optional columns of events named in this module.

        Raises:
            TraceError: no rows, a column of another length or kind, a value out of range, a block
                of two sizes or none. Names column and row.
        """
        columns = Columns(name or "trace", index)
        layers, kinds, indices = (
            columns.read(column, values)
            for column, values in (("layer", layer), ("kind", kind), ("index", index))
        )
        keys = pack_keys(kinds, layers, indices)
        distinct, block_ids = rank(keys)
        sizes = columns.read_sizes(nbytes, block_nbytes, distinct, block_ids)
        trace = cls(
            header,
            name or "trace",
            frozen(keys),
            frozen(columns.read("step", step)),
            frozen(columns.read("weight", weight)),
            frozen(columns.read("phase", phase)),
            frozen(columns.read("sequence", sequence)),
            blocks=(frozen(distinct), frozen(sizes)),
            row_token=None if token is None else frozen(columns.read("token", token, np.uint32)),
        )
        check_against(header, trace.name, layers, indices, kinds)
        check_sizes(header, trace.name, *trace.blocks)
        if header.form is Form.REQUESTS:
            trace.__dict__["block_ids"] = frozen(block_ids)  # nothing merges: it is known
        if not per_event:
            return trace
        if header.form is not Form.EVENTS and {"event_start", "action"} & set(per_event):
            raise TraceError(f"{trace.name}: event_start and action are for traces of events")
        if (starts := per_event.pop("event_start", None)) is not None:
            needed = np.flatnonzero(trace._changes)
            trace = replace(trace, event_start=frozen(columns.read_starts(starts, needed)))
        read = columns.read_of_events(per_event, trace.num_events)
        optional: dict[str, Any] = {column: frozen(values) for column, values in read.items()}
        trace = replace(trace, **optional)
        if trace.action is not None:
            check_lives(trace)
        return trace

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file. Raises `TraceError`, naming it, if it isn't one; `OSError` as open."""
        path = Path(path)
        with path.open("rb") as file:
            try:
                # A zip of arrays; numpy alone would also take a lone array, or try to unpickle.
                with zipfile.ZipFile(file) as members:
                    damaged = not all(name.endswith(".npy") for name in members.namelist())
                if damaged:
                    raise TraceError("it holds other things than arrays")
                file.seek(0)
                with np.load(file, allow_pickle=False) as arrays:
                    columns = {name: arrays[name] for name in arrays.files}
            except TraceError as error:
                raise TraceError(f"{path} is not a trace: {error}") from None
            except (*_NOT_AN_ARCHIVE, MemoryError) as error:
                raise TraceError(
                    f"{path} is not a trace, or is damaged ({error}); see tiered-mem trace import"
                ) from None
        try:
            return cls._from_columns(columns, path.stem)
        except TraceError as error:
            raise TraceError(f"{path}: {str(error).removeprefix(f'{path.stem}: ')}") from None

    @classmethod
    def _from_columns(cls, columns: dict[str, Array], name: str) -> Trace:
        header = columns.pop("header", None)
        if header is None or header.dtype != np.uint8:
            raise TraceError("it has no header, so it is not a trace")
        known = {*ROW_COLUMNS, *EVENT_COLUMNS, "token", "nbytes", "block_nbytes"}
        if missing := [column for column in ROW_COLUMNS if column not in columns]:
            raise TraceError(f"it lacks the columns {', '.join(missing)}")
        if unknown := set(columns) - known:
            raise TraceError(f"it has unknown columns: {', '.join(sorted(unknown))[:200]}")
        parsed = TraceHeader.from_json(header.tobytes())
        arguments: dict[str, Any] = dict(columns)
        return cls.from_rows(parsed, name=name, **arguments)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the trace to `path`: whole, or not at all.

        Raises `FileExistsError` if there is a file and `overwrite` isn't asked for.
        """
        kinds, layers, indices = unpack_keys(self.flat_keys)
        rows = {"step": self.row_step, "layer": layers, "kind": kinds, "weight": self.row_weight}
        rows |= {"phase": self.row_phase, "sequence": self.row_sequence}
        columns = {name: shorten(column) for name, column in rows.items()}
        columns |= {"index": indices, "block_nbytes": self.blocks[1]}
        columns |= {name: a for name in EVENT_COLUMNS if (a := getattr(self, name)) is not None}
        if self.row_token is not None:
            columns["token"] = shorten(self.row_token)
        columns["header"] = np.frombuffer(self.header.to_json().encode(), np.uint8)
        with (
            new_file(Path(path), overwrite=overwrite) as file,
            # As numpy.savez_compressed, but at the level that writes millions of rows in seconds.
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            for name, column in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, column, allow_pickle=False)

    # --- accesses and events ---

    @property
    def num_rows(self) -> int:
        return len(self.flat_keys)

    @property
    def num_accesses(self) -> int:
        return len(self.keys)

    @property
    def num_events(self) -> int:
        return len(self._starts)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of an events trace; an upper bound in a prefix one; else the requests."""
        if self.header.form is Form.EVENTS:
            pairs = self.row_sequence.astype(np.uint64) << np.uint64(32) | self.row_step
            return len(np.unique(pairs))
        return self.num_rows * (self.header.block_num_tokens or 1)

    @property
    def total_nbytes(self) -> int:
        """Bytes of all blocks of the model: of all its experts if known, else of those seen.

        Where blocks come and go, of those that were there at once, at most.
        """
        kinds = unpack_keys(self.blocks[0])[0]
        if self.action is not None:
            return most_nbytes(self)
        experts = self.header.experts_nbytes
        if experts is None:
            return int(self.blocks[1].sum())
        return experts + int(self.blocks[1][kinds != Kind.EXPERT].sum())

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where events begin among the accesses, and the end: int64 [num_events + 1]."""
        accesses, starts = self._accesses[0], self._starts
        if len(accesses) == self.num_rows:
            return frozen(np.append(starts, self.num_rows))
        # Accesses are in the order of rows, so an event's first is the first at or after its row.
        return frozen(np.append(np.searchsorted(accesses, starts), len(accesses)))

    @cached_property
    def keys(self) -> KeyArray:
        """Packed key of each access: uint64, events one after another."""
        return frozen(self.flat_keys[self._accesses[0]])

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """The router's weight of each access, summed over the event's tokens."""
        return self._accesses[1]

    @cached_property
    def block_ids(self) -> npt.NDArray[np.int64]:
        """Which of `blocks` each access is to."""
        return frozen(rank(self.keys)[1])

    @cached_property
    def nbytes(self) -> npt.NDArray[np.uint64]:
        """Size of each access' block in bytes."""
        return frozen(self.blocks[1][self.block_ids])

    @cached_property
    def event_layer(self) -> npt.NDArray[np.uint16]:
        return frozen(unpack_keys(self.flat_keys[self._starts])[1])

    @cached_property
    def event_kind(self) -> npt.NDArray[np.uint8]:
        return frozen(unpack_keys(self.flat_keys[self._starts])[0])

    @cached_property
    def event_phase(self) -> npt.NDArray[np.uint8]:
        return frozen(self.row_phase[self._starts])

    @cached_property
    def event_sequence(self) -> npt.NDArray[np.uint32]:
        return frozen(self.row_sequence[self._starts])

    @cached_property
    def event_step(self) -> npt.NDArray[np.uint32]:
        """The step of each event's first row."""
        return frozen(self.row_step[self._starts])

    def event(self, i: int) -> KeyArray:
        """Return the packed keys of event `i`."""
        return self.keys[self.offsets[i] : self.offsets[i + 1]]

    def ahead(self, i: int) -> Array:
        """Return the ids predicted at event `i` for the next layer, likeliest first."""
        if self.ahead_offset is None or self.ahead_index is None:
            raise TraceError(f"{self.name} holds no predictions for the next layer")
        return self.ahead_index[self.ahead_offset[i] : self.ahead_offset[i + 1]]

    def only(self, *actions: Action) -> Trace:
        """Return the trace of the events that do one of these. Raises `TraceError` if none does."""
        if self.action is None:
            return self
        events = np.isin(self.action, actions)
        if events.all():
            return self
        if not events.any():
            names = " or ".join(action.name for action in actions)
            raise TraceError(f"{self.name}: none of its events does {names} a block")
        return replace(self, **columns_of_events(self, events))

    @cached_property
    def reads(self) -> Trace:
        """The trace of the events that read. Raises `TraceError` if none does."""
        return self.only(Action.READ)

    @property
    def created(self) -> KeyArray:
        """Packed keys of the blocks that came into being."""
        return frozen(self.flat_keys[self.row_action == Action.CREATE])

    @cached_property
    def event_action(self) -> npt.NDArray[np.uint8]:
        """What each event does, of `Action`."""
        return frozen(np.zeros(self.num_events, np.uint8) if self.action is None else self.action)

    @property
    def row_action(self) -> Array:
        return np.repeat(self.event_action, self.event_num_rows)

    @property
    def event_num_rows(self) -> npt.NDArray[np.int64]:
        return np.diff(np.append(self._starts, self.num_rows))

    @property
    def _changes(self) -> npt.NDArray[np.bool_]:
        """Rows of another sequence, phase, layer or kind than the row before."""
        changes = np.zeros(self.num_rows, bool)
        for column in (self.row_sequence, self.row_phase, self.flat_keys >> np.uint64(32)):
            changes[1:] |= column[1:] != column[:-1]
        return changes

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """The first row of each event."""
        if self.event_start is not None:
            return self.event_start.astype(np.int64)
        if self.header.form is Form.REQUESTS:
            return np.arange(self.num_rows)
        step, begins = self.row_step, self._changes
        if self.header.form is Form.PREFIX:
            begins[1:] |= step[1:] != step[:-1]
        else:
            decode = self.row_phase[1:] == Phase.DECODE
            begins[1:] |= np.where(decode, step[1:] != step[:-1], step[1:] < step[:-1])
        begins[0] = True
        return np.flatnonzero(begins)

    @cached_property
    def _accesses(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The row of each access, ascending, and its weight."""
        everything = np.arange(self.num_rows), frozen(np.ascontiguousarray(self.row_weight))
        if self.header.form is Form.REQUESTS:
            return everything
        events = np.zeros(self.num_rows, np.int64)
        events[self._starts[1:]] = 1
        events = events.cumsum()
        order = np.lexsort((self.flat_keys, events))  # stable: a block's first row stays first
        keys, events = self.flat_keys[order], events[order]
        firsts = np.ones(self.num_rows, bool)
        firsts[1:] = (keys[1:] != keys[:-1]) | (events[1:] != events[:-1])
        if firsts.all():
            return everything
        starts = np.flatnonzero(firsts)
        sums = np.add.reduceat(self.row_weight[order].astype(np.float64), starts)
        rows = order[starts]
        back = np.argsort(rows)
        return rows[back], frozen(sums[back].astype(np.float32))


# What numpy and zipfile raise, by measure, on files that aren't archives of plain arrays.
_NOT_AN_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
)

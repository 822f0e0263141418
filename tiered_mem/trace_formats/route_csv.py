"""Expert routes as BigMoeOnEdge writes them: one row a routed expert.

`#` lines come first: the model with n_layer, n_expert and n_expert_used (top-k), then
expert_bytes and dense_bytes of each layer. Rows are turn, phase (0 is prefill), step, layer,
slot (the rank among the top-k), expert, weight, residency, expert_bytes. The last is 0 where the
expert was resident, so sizes are those of the `#` lines; in prefill, rows go layer by layer.
Source: https://github.com/Helldez/BigMoeOnEdge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem.keys import Kind
from tiered_mem.trace import Form, Trace, TraceHeader
from tiered_mem.trace_formats.source import Source

# Column: the highest value it may have. The last two say what that run's cache did.
_HIGHEST = {
    "turn": 2**32 - 1,
    "phase": 1,
    "step": 2**32 - 1,
    "layer": 2**16 - 1,
    "slot": 2**16 - 1,
    "expert": 2**32 - 1,
    "weight": None,
    "residency": 2**32 - 1,
    "expert_bytes": 2**53,
}
_OPTIONAL = {"residency", "expert_bytes"}
_PAIR = re.compile(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)")

Rows = npt.NDArray[np.float64]


def recognise(start: bytes) -> bool:
    return start.startswith((b"# route_trace", b"turn,phase,step,layer"))


def read(source: Source) -> Trace:
    """Return the trace. Raises `TraceError`, naming the line, on anything malformed."""
    head = _Head.read(source)
    names, rows, line_numbers = _read_rows(source, head.num_lines)
    columns = {name: rows[:, i] for i, name in enumerate(names)}
    for name, column in columns.items():
        _check(source, name, column, line_numbers, head)
    layers = columns["layer"].astype(np.int64)
    num_layers = head.num_layers or max(int(layers.max()), *head.expert_nbytes, 0) + 1
    sizes = head.expert_nbytes or _sizes_from_rows(columns)
    if (unsized := set(np.unique(layers).tolist()) - set(sizes)) != set():
        line = line_numbers[int(np.flatnonzero(np.isin(layers, list(unsized)))[0])]
        raise source.error(f"no line gives the expert_bytes of layer {min(unsized)}", line)
    expert_nbytes = np.array([sizes.get(layer, 0) for layer in range(num_layers)])
    header = TraceHeader(
        Form.EVENTS,
        model=head.model,
        source=source.path.name,
        num_layers=num_layers,
        num_experts=head.num_experts,
        top_k=head.top_k,
        expert_nbytes=tuple(expert_nbytes.tolist()),
        dense_nbytes=tuple(head.dense_nbytes.get(layer, 0) for layer in range(num_layers)),
    )
    return Trace.from_rows(
        header,
        step=columns["step"].astype(np.uint32),
        layer=layers,
        kind=Kind.EXPERT,
        index=columns["expert"].astype(np.uint32),
        weight=columns["weight"],
        phase=columns["phase"].astype(np.uint8),
        sequence=columns["turn"].astype(np.uint32),
        nbytes=expert_nbytes[layers],
        name=source.name,
    )


@dataclass
class _Head:
    """What the `#` lines say."""

    num_lines: int = 0
    model: str = ""
    num_layers: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    expert_nbytes: dict[int, int] = field(default_factory=dict)
    dense_nbytes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Source) -> _Head:
        head = cls()
        for number, line in enumerate(source.lines, start=1):
            if not line.startswith("#"):
                head.num_lines = number - 1
                return head
            pairs = dict(_PAIR.findall(line))

            def whole(name: str, pairs: Any = pairs, number: int = number) -> int:
                if not re.fullmatch(r"\d{1,15}", pairs[name]):
                    raise source.error(f"{name} is {pairs[name]!r}, not a whole number", number)
                return int(pairs[name])

            if "n_layer" in pairs:
                head.model = PurePosixPath(pairs.get("model", "")).stem
                head.num_layers = whole("n_layer") or None
                head.num_experts = whole("n_expert") if "n_expert" in pairs else None
                head.top_k = whole("n_expert_used") if "n_expert_used" in pairs else None
            elif "layer" in pairs:
                layer = whole("layer")
                if layer >= (head.num_layers or 2**16):
                    raise source.error(f"layer {layer} is beyond n_layer={head.num_layers}", number)
                if "expert_bytes" in pairs:
                    head.expert_nbytes[layer] = whole("expert_bytes")
                if "dense_bytes" in pairs:
                    head.dense_nbytes[layer] = whole("dense_bytes")
        raise source.error("it has no rows")


def _read_rows(source: Source, start: int) -> tuple[list[str], Rows, list[int]]:
    """Return the columns' names, the rows as float64 [rows, columns], and their line numbers."""
    names = [name.strip() for name in source.lines[start].split(",")]
    missing = set(_HIGHEST) - _OPTIONAL - set(names)
    unknown = set(names) - set(_HIGHEST)
    if missing or unknown or len(set(names)) != len(names):
        told = f"no {', '.join(sorted(missing))}" if missing else f"these: {','.join(names)[:100]}"
        raise source.error(f"the columns are not those of a route CSV: {told}", start + 1)
    numbered = enumerate(source.lines[start + 1 :], start + 2)
    body = {number: line for number, line in numbered if line and not line.isspace()}
    numbers = list(body)
    if not numbers:
        raise source.error("it has no rows")
    try:
        rows = np.loadtxt(list(body.values()), delimiter=",", comments=None, ndmin=2)
    except ValueError:
        raise _find_bad_line(source, numbers, len(names)) from None
    if rows.shape != (len(numbers), len(names)):
        raise _find_bad_line(source, numbers, len(names))
    return names, rows, numbers


def _find_bad_line(source: Source, numbers: list[int], num_columns: int) -> Exception:
    """numpy says which row it stumbled over, but counts other lines than an editor does."""
    for number in numbers:
        cells = source.lines[number - 1].split(",")
        if len(cells) != num_columns:
            return source.error(
                f"{len(cells)} columns, where there are {num_columns} names", number
            )
        for cell in cells:
            try:
                float(cell)
            except ValueError:
                return source.error(f"{cell.strip()!r:.40} is not a number", number)
    return source.error("it can't be read as a table of numbers")


def _check(source: Source, name: str, column: Rows, numbers: list[int], head: _Head) -> None:
    highest = _HIGHEST[name]
    if highest is None:
        fine, wanted = np.isfinite(column), "a finite number"
    else:
        model = {"layer": head.num_layers, "expert": head.num_experts, "slot": head.top_k}
        highest = min(highest, (model.get(name) or highest + 1) - 1)
        with np.errstate(invalid="ignore"):
            fine = (column >= 0) & (column <= highest) & (column % 1 == 0)
        wanted = f"a whole number of 0 to {highest}"
    if not fine.all():
        row = int(np.flatnonzero(~fine)[0])
        raise source.error(f"{name} is {column[row]:g}, not {wanted}", numbers[row])


def _sizes_from_rows(columns: dict[str, Rows]) -> dict[int, int]:
    """Sizes by layer from the rows of experts that weren't resident."""
    if "expert_bytes" not in columns:
        return {}
    layers, sizes = columns["layer"].astype(np.int64), columns["expert_bytes"].astype(np.int64)
    return dict(zip(layers[sizes > 0].tolist(), sizes[sizes > 0].tolist(), strict=True))

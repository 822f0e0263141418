"""What is known of a whole trace: the model, the sizes, where it is from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem.errors import TraceError
from tiered_mem.keys import BlockKey, KeyArray, Kind, unpack_keys

Array = npt.NDArray[Any]

FORMAT_VERSION = 1


class Form(StrEnum):
    """What one event of a trace is."""

    EVENTS = "events"  # one layer step of one token, or of the tokens of a prefill
    PREFIX = "prefix"  # one request: the chain of KV blocks of its prompt
    REQUESTS = "requests"  # one access: flat traces of caches


@dataclass(frozen=True)
class TraceHeader:
    """What a trace is of. What isn't known is None or empty.

    `expert_nbytes` and `dense_nbytes` hold one number a layer (0: the layer has none);
    `block_num_tokens` is the tokens of a KV block. Raises `TraceError` for what can't be.
    """

    form: Form
    model: str = ""
    source: str = ""  # where the trace is from: a file, or the command that recorded it
    num_layers: int | None = None
    num_experts: int | None = None  # of a layer
    top_k: int | None = None
    expert_nbytes: tuple[int, ...] = ()
    dense_nbytes: tuple[int, ...] = ()
    block_num_tokens: int | None = None
    note: str = ""  # what a reader should know: options of an import, what it dropped

    def __post_init__(self) -> None:
        for name in ("model", "source", "note"):
            if not isinstance(getattr(self, name), str):
                raise TraceError(f"the header's {name} is not text")
        try:
            object.__setattr__(self, "form", Form(self.form))
        except ValueError:
            forms = ", ".join(Form)
            raise TraceError(f"the header's form is {self.form!r}, not one of {forms}") from None
        for name in ("num_layers", "num_experts", "top_k", "block_num_tokens"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and 0 < value < 1 << 32):
                raise TraceError(f"the header's {name} is {value!r}, not a positive number")
        for name in ("expert_nbytes", "dense_nbytes"):
            sizes = getattr(self, name)
            if not all(_is_int(size) and 0 <= size < 1 << 63 for size in sizes):
                raise TraceError(f"the header's {name} are not all sizes in bytes: {sizes!r:.100}")
            if sizes and len(sizes) != self.num_layers:
                raise TraceError(
                    f"the header has {name} of {len(sizes)} layers, but num_layers is "
                    f"{self.num_layers}"
                )
            object.__setattr__(self, name, tuple(sizes))
        if self.top_k and self.num_experts and self.top_k > self.num_experts:
            raise TraceError(f"the header's top_k {self.top_k} is above {self.num_experts} experts")

    @property
    def experts_nbytes(self) -> int | None:
        """Bytes of all experts of the model, used or not; None if they aren't known."""
        if self.num_experts is None or not self.expert_nbytes:
            return None
        return self.num_experts * sum(self.expert_nbytes)

    def to_json(self) -> str:
        return json.dumps({"version": FORMAT_VERSION} | asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> TraceHeader:
        """Raises `TraceError` on anything but a header of this version."""
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"the header is not JSON: {error}") from None
        if not isinstance(found, dict) or "version" not in found:
            raise TraceError("the header is not that of a trace")
        if (version := found.pop("version")) != FORMAT_VERSION:
            raise TraceError(
                f"the trace has format version {version!r:.40}; this tiered-mem reads version "
                f"{FORMAT_VERSION}: import or record it again, or use another tiered-mem"
            )
        if unknown := set(found) - {field.name for field in fields(cls)}:
            raise TraceError(f"the header has unknown fields: {', '.join(sorted(unknown))[:200]}")
        if "form" not in found:
            raise TraceError("the header names no form")
        for name in ("expert_nbytes", "dense_nbytes"):
            if not isinstance(found.get(name, []), list):
                raise TraceError(f"the header's {name} is not a list")
        return cls(**found)


def check_against(header: TraceHeader, trace: str, layer: Array, index: Array, kind: Array) -> None:
    """Raise `TraceError` for a row whose layer, or expert's index, the header rules out."""
    for name, column, limit in (
        ("layer", layer, header.num_layers),
        ("index", np.where(kind == Kind.EXPERT, index, 0), header.num_experts),
    ):
        if limit is not None and (bad := np.flatnonzero(column >= limit)).size:
            raise TraceError(
                f"{trace}: row {bad[0]}: {name} is {column[bad[0]]}, but the header says "
                f"there are {limit}"
            )


def check_sizes(
    header: TraceHeader, trace: str, blocks: KeyArray, sizes: npt.NDArray[np.uint64]
) -> None:
    """Raise `TraceError` for an expert of another size than the header says."""
    if not header.expert_nbytes:
        return
    kinds, layers, _ = unpack_keys(blocks)
    told = np.array(header.expert_nbytes, np.uint64)[layers]
    wrong = np.flatnonzero((kinds == Kind.EXPERT) & (told != sizes))
    if wrong.size:
        block = BlockKey.unpack(int(blocks[wrong[0]]))
        raise TraceError(
            f"{trace}: {block} has {sizes[wrong[0]]} bytes, but the header says {told[wrong[0]]}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

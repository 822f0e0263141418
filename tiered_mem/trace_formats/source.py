"""A file in a foreign format: its bytes, and errors that name it and the line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import zstandard

from tiered_mem.errors import TraceError

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Source:
    """A file read whole, decompressed if it was compressed with zstd."""

    path: Path
    data: bytes

    @classmethod
    def open(cls, path: Path) -> Source:
        """Raises `TraceError` if the file is empty or damaged, `OSError` as open does."""
        data = path.read_bytes()
        if data.startswith(_ZSTD_MAGIC):
            data = _decompress(path, data)
        if not data.strip():
            raise TraceError(f"{path} is empty")
        return cls(path, data)

    @property
    def name(self) -> str:
        """The file's name without what follows its first dot."""
        return self.path.name.split(".")[0] or self.path.name

    @cached_property
    def lines(self) -> list[str]:
        """The lines of text; line 1 is `lines[0]`. Raises `TraceError` if it isn't UTF-8."""
        try:
            return self.data.decode().split("\n")
        except UnicodeDecodeError as error:
            raise self.error(
                "not text in UTF-8", self.data[: error.start].count(b"\n") + 1
            ) from None

    def records(self) -> Iterator[Record]:
        """Yield the JSON object of each line that isn't blank."""
        for number, line in enumerate(self.lines, start=1):
            if not line or line.isspace():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self.error(f"not JSON: {error}", number) from None
            if not isinstance(fields, dict):
                raise self.error("not a JSON object", number)
            yield Record(self, number, fields)

    def error(self, message: str, line: int | None = None) -> TraceError:
        where = f"{self.path}" if line is None else f"{self.path}, line {line}"
        return TraceError(f"{where}: {message}")


@dataclass(frozen=True)
class Record:
    """One line of JSON. Every getter raises `TraceError`, naming the line, on another type."""

    source: Source
    line: int
    fields: dict[str, Any]

    def error(self, message: str) -> TraceError:
        return self.source.error(message, self.line)

    def get(self, name: str) -> Any:
        if name not in self.fields:
            raise self.error(f"no {name}")
        return self.fields[name]

    def whole(self, name: str, lowest: int = 0, highest: int = (1 << 32) - 1) -> int:
        value = self.get(name)
        if type(value) is not int or not lowest <= value <= highest:
            raise self.error(
                f"{name} is {value!r:.40}, not a whole number of {lowest} to {highest}"
            )
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(f"{name} is {value!r:.40}, not a finite number")
        return float(value)

    def whole_list(self, name: str, highest: int) -> list[int]:
        values = self.get(name)
        if not isinstance(values, list) or not set(map(type, values)) <= {int}:
            raise self.error(f"{name} is {values!r:.40}, not a list of whole numbers")
        if values and not 0 <= min(values) <= max(values) <= highest:
            worst = min(values) if min(values) < 0 else max(values)
            raise self.error(f"{name} holds {worst}, not in 0 to {highest}")
        return values

    def number_list(self, name: str) -> list[float]:
        values = self.get(name)
        if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
            raise self.error(f"{name} is {values!r:.40}, not a list of numbers")
        if not all(map(math.isfinite, values)):
            raise self.error(f"{name} holds a number that isn't finite")
        return values


def _decompress(path: Path, data: bytes) -> bytes:
    pieces = []
    while data:  # a file may hold several frames
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            pieces.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise TraceError(f"{path} is damaged: {error}") from None
        if not frame.eof:
            raise TraceError(f"{path} is damaged: its last zstd frame is cut off")
        data = frame.unused_data
    return b"".join(pieces)

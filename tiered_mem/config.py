"""Sizes and budgets: what people write, in bytes."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from fractions import Fraction

import psutil

from tiered_mem import cgroup
from tiered_mem.errors import BudgetError, ConfigError

Size = int | str

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*|%)\s*")

# What "auto" leaves to everybody else on the machine: a tenth, but not less than 1 GiB.
_ROOM_SHARE = 0.1
_ROOM_NBYTES = 1 << 30

_MAX_SIZE = (1 << 63) - 1  # what the core counts with


class BudgetWarning(UserWarning):
    """A budget that works, but below the size from which it works well."""


def parse_size(size: Size, *, whole: int | None = None) -> int:
    """Return `size` in bytes: an int, or text such as "6GiB", "500MB" or "25%" (of `whole` bytes).

    Raises `ConfigError` for anything else, negative sizes included.
    """
    nbytes = size if isinstance(size, int) and not isinstance(size, bool) else _read(size, whole)
    if nbytes < 0:
        raise ConfigError(f"a size can't be negative: {size}")
    if nbytes > _MAX_SIZE:
        raise ConfigError("a size is less than 8 EiB: give a smaller one")
    return nbytes


def _read(size: object, whole: int | None) -> int:
    match = _SIZE.fullmatch(size) if isinstance(size, str) and len(size) < 64 else None
    if match is None or match[2].upper() not in {*_UNITS, "%"}:
        raise ConfigError(f"not a size: {size!r}; write 6GiB, 500MB, 25% or a number of bytes")
    number, unit = Fraction(match[1]), match[2].upper()
    if unit != "%":
        return round(number * _UNITS[unit])
    if whole is None:
        raise ConfigError(f"{size!r} is a share of nothing here; write a size such as 6GiB")
    return round(whole * number / 100)


def format_size(nbytes: float) -> str:
    """Return `nbytes` for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def headroom() -> int:
    """Return the bytes of host memory beyond the machine's room; negative where that is cut into.

    A limit on this process's control group counts as the machine does.
    """
    memory = psutil.virtual_memory()
    left = cgroup.memory_left()
    available = memory.available if left is None else min(memory.available, left)
    return int(available - max(_ROOM_NBYTES, _ROOM_SHARE * memory.total))


def memory_to_spare() -> int:
    """Return the bytes of host memory that can be taken while leaving the machine room."""
    return max(0, headroom())


# Policies that keep some of a cycle through the layers that is larger than the tier.
_ABOVE_CYCLES = ("adaptive", "hint-aware", "least-stale", "lirs", "random")


@dataclass(frozen=True)
class WorkingSet:
    """What a model asks of the budgets, in bytes of slots.

    `event_nbytes` is the largest event of one token (top-k experts of a layer), `cycle_nbytes` what
    one token needs in all layers: below it a global LRU hits next to nothing.
    """

    experts_nbytes: int
    cycle_nbytes: int
    event_nbytes: int


@dataclass(frozen=True)
class Budgets:
    """Bytes of each tier. `auto_*` tells which of them follow the memory the machine has left."""

    hbm: int
    dram: int
    auto_hbm: bool = False
    auto_dram: bool = False

    @classmethod
    def resolve(cls, hbm: Size, dram: Size, *, whole: int) -> Budgets:
        """Turn what the user wrote into bytes. `whole` is the size of all blocks: what % refers to.

        "auto" takes what is useful (no more than `whole`) and leaves the machine room. With no GPU,
        host memory plays HBM's part: then `hbm="auto"` takes all of it, and DRAM nothing.

        Raises:
            BudgetError: zero HBM, or more than the machine has.
            ConfigError: not a size.
        """
        total = psutil.virtual_memory().total
        spare = memory_to_spare()
        auto_hbm, auto_dram = hbm == "auto", dram == "auto"
        share_of = whole or None  # without blocks there is nothing to take a share of
        dram_nbytes = 0 if auto_dram else parse_size(dram, whole=share_of)
        useful = min(whole, spare - dram_nbytes)
        hbm_nbytes = useful if auto_hbm else parse_size(hbm, whole=share_of)
        if auto_dram:
            dram_nbytes = max(0, min(whole - hbm_nbytes, spare - hbm_nbytes))
        if hbm_nbytes <= 0:
            raise BudgetError(f"hbm={hbm!r} leaves no byte for HBM: give it a size above zero")
        for name, nbytes in (("hbm", hbm_nbytes), ("dram", dram_nbytes)):
            if nbytes > total:
                raise BudgetError(
                    f"{name} is {format_size(nbytes)}, more than the {format_size(total)} of "
                    "memory this machine has; give a smaller size, or 'auto'"
                )
        if hbm_nbytes + dram_nbytes > total:
            raise BudgetError(
                f"hbm and dram together are {format_size(hbm_nbytes + dram_nbytes)}, more than the "
                f"{format_size(total)} of memory this machine has, and without a GPU both are host "
                "memory; give smaller sizes"
            )
        return cls(hbm_nbytes, dram_nbytes, auto_hbm, auto_dram)

    def check(self, needs: WorkingSet, eviction: str, *, warn: bool = True) -> None:
        """Raise `BudgetError` if HBM can't hold one event of one token. Warn below its cycle."""
        if self.hbm < needs.event_nbytes:
            raise BudgetError(
                f"hbm is {format_size(self.hbm)}, but one layer of one token needs "
                f"{format_size(needs.event_nbytes)} ({needs.event_nbytes} bytes) of experts at "
                "once; give at least that"
            )
        if warn and self.hbm < needs.cycle_nbytes and not eviction.startswith("per-layer("):
            so = "little there: give at least that"
            if not eviction.startswith(_ABOVE_CYCLES):
                so = (
                    "next to nothing there: give at least that, or use eviction='adaptive' or "
                    f"'per-layer({eviction})'"
                )
            warnings.warn(
                f"hbm is {format_size(self.hbm)}, below one token's cycle of "
                f"{format_size(needs.cycle_nbytes)} ({needs.cycle_nbytes} bytes: top-k experts of "
                f"every layer); {eviction} over all layers hits {so}",
                BudgetWarning,
                stacklevel=3,
            )

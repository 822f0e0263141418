"""Sizes and budgets: what people write, in bytes."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import psutil

from tiered_mem import cgroup
from tiered_mem.callers import stacklevel
from tiered_mem.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from tiered_mem.device import Backend

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

# What "auto" leaves free on a device beyond the room that it is told of: kernels that are loaded
# late, workspaces, and what an allocator loses to fragments.
_DEVICE_ROOM_SHARE = 0.03
_DEVICE_ROOM_NBYTES = 256 << 20

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
class DeviceMemory:
    """The memory of a device that isn't host memory: bytes that can be taken now, and in all."""

    name: str
    available: int
    total: int

    @classmethod
    def of(cls, backend: Backend) -> DeviceMemory | None:
        """Return what a device has; None where HBM is host memory."""
        return None if backend.in_place else cls(backend.name, *backend.memory())

    @property
    def room(self) -> int:
        """The bytes that "auto" leaves free."""
        return int(max(_DEVICE_ROOM_NBYTES, _DEVICE_ROOM_SHARE * self.total))

    def headroom(self) -> int:
        """Return the bytes beyond that room; negative where it is cut into."""
        return self.available - self.room


@dataclass(frozen=True)
class Budgets:
    """Bytes of each tier. `auto_*` tells which of them follow the memory the machine has left."""

    hbm: int
    dram: int
    auto_hbm: bool = False
    auto_dram: bool = False

    @classmethod
    def for_backend(
        cls, hbm: Size, dram: Size, *, whole: int, backend: Backend, room: int = 0
    ) -> Budgets:
        """Return `resolve` for a device. Where GPU and CPU share memory, there is no DRAM tier.

        Raises `ConfigError` too for a DRAM tier where it would be the very memory that HBM is.
        """
        if backend.in_place and backend.name != "cpu":
            if dram != "auto" and parse_size(dram, whole=whole or None) > 0:
                raise ConfigError(
                    f"{backend.name} shares its memory with the CPU: a DRAM tier would only add "
                    f"copies within it; use dram=0 and a larger hbm than {hbm!r}"
                )
            dram = 0
        return cls.resolve(hbm, dram, whole=whole, device=DeviceMemory.of(backend), room=room)

    @classmethod
    def resolve(
        cls, hbm: Size, dram: Size, *, whole: int, device: DeviceMemory | None = None, room: int = 0
    ) -> Budgets:
        """Turn what the user wrote into bytes. `whole` is the size of all blocks: what % refers to.

        "auto" takes what is useful (no more than `whole`) and leaves room: to the machine, on a
        `device`, and `room` bytes beside HBM for what computing takes (activations, KV). Without a
        device's own memory, host memory plays HBM's part: then `hbm="auto"` takes all of it, and
        DRAM nothing.

        Raises:
            BudgetError: zero HBM, or more than there is.
            ConfigError: not a size.
        """
        auto_hbm, auto_dram = hbm == "auto", dram == "auto"
        share_of = whole or None  # without blocks there is nothing to take a share of
        spare = memory_to_spare()
        dram_nbytes = 0 if auto_dram else parse_size(dram, whole=share_of)
        if auto_hbm:
            free = spare - dram_nbytes if device is None else device.headroom()
            hbm_nbytes = min(whole, free - room)
        else:
            hbm_nbytes = parse_size(hbm, whole=share_of)
        if auto_dram:
            left = spare - hbm_nbytes if device is None else spare
            dram_nbytes = max(0, min(whole - hbm_nbytes, left))
        if hbm_nbytes <= 0:
            why = ""
            if auto_hbm and device is not None and whole > 0:
                why = f" ({format_size(device.available)} of {device.name} are left)"
            raise BudgetError(f"hbm={hbm!r} leaves no byte for HBM{why}: give it a size above zero")
        _check_against_machine(hbm_nbytes, dram_nbytes, device)
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
                stacklevel=stacklevel(),
            )


def _check_against_machine(hbm: int, dram: int, device: DeviceMemory | None) -> None:
    """Raise `BudgetError` for more than there is in all."""
    total = psutil.virtual_memory().total
    if device is not None and hbm > device.total:
        raise BudgetError(
            f"hbm is {format_size(hbm)}, more than the {format_size(device.total)} of "
            f"{device.name}; give a smaller size, or 'auto'"
        )
    of_host = {"dram": dram} if device is not None else {"hbm": hbm, "dram": dram}
    for name, nbytes in of_host.items():
        if nbytes > total:
            raise BudgetError(
                f"{name} is {format_size(nbytes)}, more than the {format_size(total)} of memory "
                "this machine has; give a smaller size, or 'auto'"
            )
    if device is None and hbm + dram > total:
        raise BudgetError(
            f"hbm and dram together are {format_size(hbm + dram)}, more than the "
            f"{format_size(total)} of memory this machine has, and here both are host memory; give "
            "smaller sizes"
        )

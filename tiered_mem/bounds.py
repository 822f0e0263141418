"""What no policy can beat: Belady on demand, and the least stall that any prefetcher can have.

**Belady's MIN** (L. A. Belady, 1966) lets go what is used furthest in the future. Here it works on
events, in two forms:

- forced admission: when an event ends, all its blocks are in HBM, as in the runtime, whose events
  pin them;
- bypass: a missing block may pass through without taking room from what is used sooner. So may
  those of an event larger than HBM in the first form, for the runtime cuts it into waves; and where
  events read KV, which always go in short waves, both forms are this one.

If all slots are of one size, both are the least that a policy on demand can miss. For several sizes
the least is NP-hard to find: then they are what a good clairvoyant policy reaches (`is_exact` is
false). `byte_miss_ratio_lower` is a bound whatever the sizes: there, any part of a block may stay.

**The least stall** knows the future too, and may load ahead. Why no schedule beats it:

1. Think of each byte of a block as a unit of its own. Between two events that use it, it either
   stays in HBM or crosses the link again. When an event ends its blocks are in HBM, so what stays
   for others is at most `hbm` less their bytes. To choose the most bytes that can stay under such
   limits is to pack intervals of one weight, for which it is best to drop whatever ends last. That
   is best for every beginning of the trace at once, since it drops what ends after the beginning
   before anything that ends within.
2. So at least `F(j)` bytes have crossed the link when event j ends, whoever chose what stays, and j
   ends no sooner than `latency + F(j) / bandwidth`. This leaves open when computing begins: an
   event may compute on its first block while the others load.
3. The same holds from the end of any event i on. HBM then holds the blocks of i and, at best, what
   is used soonest. By step 1, `G(i, j)` more bytes must cross before event j ends, so j ends no
   sooner than `G(i, j) / bandwidth` after i. That is what a full HBM costs: an idle link is of no
   use if there is no room to load into.
4. And j ends no sooner than its own compute time after the event before it. The longest path
   through all these is a time that no schedule undercuts; less the compute, it is the least stall.

Step 3 is tried for as many windows as cost O(n log n), of all lengths, from starts spread evenly:
leaving some out lowers the bound and never makes it wrong. Nor is it quite the optimum, which takes
a linear program (S. Albers, N. Garg, S. Leonardi, "Minimizing stall time in single and parallel
disk systems", 2000): a block on its way takes a whole slot, but counts here only as far as it came.

With DRAM two such bounds hold, and the larger counts: all bytes over both links together, and over
NVMe's alone what both tiers together can't keep.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiered_mem import _core
from tiered_mem.errors import BudgetError
from tiered_mem.keys import Kind
from tiered_mem.trace import Action, Form, Trace

if TYPE_CHECKING:
    from tiered_mem.simulate import LinkSpeed, Machine

Nbytes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Bounds:
    """Bounds for one trace and HBM budget. Byte miss ratios are of the bytes of all accesses.

    In traces of prefixes and of requests each access is an event of its own. A stall there is what
    the simulator counts: nothing computes, and of prefixes only what was there before is loaded.

    Where blocks are created, that puts them into HBM, where every policy must have or let go them,
    and isn't an access. The least stall there is only what the bytes to be read take on the link.
    """

    num_accesses: int
    num_misses_forced: int
    num_misses_bypass: int
    byte_miss_ratio_forced: float
    byte_miss_ratio_bypass: float
    byte_miss_ratio_lower: float  # below that of any policy on demand, whatever the sizes
    is_exact: bool  # all slots are of one size: no policy on demand misses less
    # Prefix traces: what even an unlimited HBM misses, only contiguous prefixes being hits.
    num_misses_prefix: int | None
    stall_seconds_demand: float  # of Belady with forced admission, nothing loaded ahead
    stall_seconds_lower: float  # below that of any policy with any prefetcher

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bounds(trace: Trace, *, hbm: int, machine: Machine, dram: int = 0) -> Bounds:
    """Bound what policies can reach on `trace` with HBM of `hbm` bytes, empty at the start.

    `machine` gives the links, and the computing of events that have no recorded one. With `dram`
    bytes of DRAM beside it, `stall_seconds_lower` is of both tiers; all else is of HBM alone.

    Raises:
        BudgetError: HBM can't hold each block of the trace.
    """
    trace = trace.only(Action.READ, Action.CREATE)
    # A block's first use is what creates it. It can't be a hit, and so changes no optimum.
    created = np.repeat(trace.event_action == Action.CREATE, np.diff(trace.offsets))
    nbytes = trace.blocks[1]
    slots = _slot_nbytes(nbytes)
    if hbm < slots.max():
        raise BudgetError(
            f"hbm is {hbm} bytes, but {trace.name} has a block that takes {slots.max()}; give at "
            "least that"
        )
    blocks = trace.block_ids.astype(np.uint32)
    whole = trace.header.form is Form.EVENTS
    offsets = trace.offsets if whole else np.arange(len(blocks) + 1)
    by_slot = _core.Future(offsets, blocks, slots)
    forced = _core.belady(by_slot, capacity=hbm, pinned_nbytes=hbm, divisible=False) > 0
    bypass = _core.belady(by_slot, capacity=hbm, pinned_nbytes=0, divisible=False) > 0
    if whole and (trace.event_kind == Kind.KV).any():
        forced = bypass.copy()  # events of KV run in short waves: not all their blocks stay
    by_byte = _core.Future(offsets, blocks, nbytes)
    room = _usable(hbm, nbytes, slots)[1]
    lower = _core.belady(by_byte, capacity=room, pinned_nbytes=0, divisible=True)
    for misses in (forced, bypass, lower):
        misses[created] = 0
    num_misses_prefix = None
    if trace.header.form is Form.PREFIX:
        num_misses_prefix = _misses_prefix(trace)
        stalls = _stalls_of_prefixes(trace, forced, lower, machine.nvme)
    elif created.any():
        stalls = (
            _stall_demand(trace, forced, machine),
            _stall_of_bytes(trace, int(lower.sum()), dram, machine),
        )
    else:
        stalls = (
            _stall_demand(trace, forced, machine),
            _stall_lower(trace, by_byte, hbm, dram, machine),
        )
    total = int(trace.nbytes[~created].sum())
    return Bounds(
        num_accesses=int((~created).sum()),
        num_misses_forced=int(forced.sum()),
        num_misses_bypass=int(bypass.sum()),
        byte_miss_ratio_forced=int(trace.nbytes[forced].sum()) / total,
        byte_miss_ratio_bypass=int(trace.nbytes[bypass].sum()) / total,
        byte_miss_ratio_lower=int(lower.sum()) / total,
        is_exact=bool((slots == slots[0]).all()),
        num_misses_prefix=num_misses_prefix,
        stall_seconds_demand=stalls[0],
        stall_seconds_lower=stalls[1],
    )


def _slot_nbytes(nbytes: Nbytes) -> Nbytes:
    page = np.uint64(_core.IO_ALIGNMENT)
    return (nbytes + (page - np.uint64(1))) // page * page


def _usable(budget: int, nbytes: Nbytes, slots: Nbytes) -> tuple[int, int]:
    """Return bytes of blocks: so many fit the budget for certain, and more never do.

    Slots are larger than their blocks, and what is left at the end of the budget may hold none.
    """
    pairs = {(int(n), int(s)) for n, s in np.unique(np.stack([nbytes, slots]), axis=1).T}
    unit = gcd(*(slot for _, slot in pairs))
    limits = [budget // unit * unit * n // slot for n, slot in pairs]
    return min(limits), max(limits)


def _misses_prefix(trace: Trace) -> int:
    """Return the accesses that no earlier request made, and those that stand behind one."""
    starts = trace.offsets[:-1]
    event = np.repeat(np.arange(trace.num_events), np.diff(trace.offsets))
    first = np.full(len(trace.blocks[0]), trace.num_events)
    np.minimum.at(first, trace.block_ids, event)
    position = np.arange(trace.num_accesses)
    new = np.where(first[trace.block_ids] == event, position, trace.num_accesses)
    return int((position >= np.minimum.reduceat(new, starts)[event]).sum())


# --- stall ---


def _stall_demand(trace: Trace, forced: npt.NDArray[np.bool_], machine: Machine) -> float:
    """Return the stall if what an event lacks (`forced`, by access) is loaded when it begins.

    Present blocks are computed first, then each missing one as it arrives.
    """
    starts = trace.offsets[:-1]
    num_missed = np.add.reduceat(forced.astype(np.int64), starts)
    arriving = np.add.reduceat(np.where(forced, trace.nbytes, 0), starts).astype(np.float64)
    arriving /= machine.nvme.bytes_per_second
    _, compute = machine.event_seconds(trace)
    # An event's blocks are of one layer, and so of one size.
    share = compute / np.diff(trace.offsets)
    waits_for_first = arriving / np.maximum(num_missed, 1) + num_missed * share
    waits_for_last = arriving + share
    ended = machine.nvme.latency + np.maximum(waits_for_first, waits_for_last)
    return float(np.maximum(ended - compute, 0)[num_missed > 0].sum())


def _stall_lower(
    trace: Trace, future: _core.Future, hbm: int, dram: int, machine: Machine
) -> float:
    """Return the least stall of events, `future` having the bytes of their blocks."""
    nbytes = trace.blocks[1]
    slots = _slot_nbytes(nbytes)
    work = np.add(*machine.event_seconds(trace))
    pinned, room = _usable(hbm, nbytes, slots)

    def least(room: int, bytes_per_second: float, latency: float) -> float:
        seconds: float = _core.least_seconds(
            future,
            capacity=room,
            pinned_nbytes=pinned,
            bytes_per_second=bytes_per_second,
            latency=latency,
            work=work,
        )
        return max(0.0, seconds - float(work.sum()))

    nvme, copy = machine.nvme, machine.hbm
    if not dram:
        return least(room, nvme.bytes_per_second, nvme.latency)
    both = nvme.bytes_per_second + copy.bytes_per_second
    return max(
        least(room, both, min(nvme.latency, copy.latency)),
        least(room + _usable(dram, nbytes, slots)[1], nvme.bytes_per_second, nvme.latency),
    )


def _stall_of_bytes(trace: Trace, nbytes: int, dram: int, machine: Machine) -> float:
    """Return the least stall of events that read so many bytes: step 2 above, for the last one."""
    if nbytes == 0:
        return 0.0
    bytes_per_second, latency = machine.nvme.bytes_per_second, machine.nvme.latency
    if dram:
        bytes_per_second += machine.hbm.bytes_per_second
        latency = min(latency, machine.hbm.latency)
    work = float(np.add(*machine.event_seconds(trace)).sum())
    return max(0.0, latency + nbytes / bytes_per_second - work)


def _stalls_of_prefixes(
    trace: Trace, forced: npt.NDArray[np.bool_], lower: Nbytes, nvme: LinkSpeed
) -> tuple[float, float]:
    """Return the stall on demand and the least, of requests that load what was there before.

    What is new comes into being in HBM, nothing is predicted, and nothing computes meanwhile.
    """
    again = np.ones(trace.num_accesses, bool)
    again[np.unique(trace.block_ids, return_index=True)[1]] = False
    demanded = np.add.reduceat(np.where(forced & again, trace.nbytes, 0), trace.offsets[:-1])
    least = int(lower[again].sum())
    return (
        sum(map(nvme.seconds, demanded[demanded > 0].tolist()), 0.0),
        nvme.seconds(least) if least else 0.0,
    )

"""Requests that share prefixes, on a simulated HBM.

A block is a hit only if all blocks before it in its request are in HBM; what was seen before and
isn't one is read from NVMe, what is new comes into being in HBM. Both go through the same residency
and policy, one block after the other.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

from tiered_mem import _core
from tiered_mem.keys import Kind
from tiered_mem.trace import Trace

if TYPE_CHECKING:
    from tiered_mem.simulate import Machine, Run


def run_prefixes(trace: Trace, run: Run, machine: Machine) -> None:
    """Replay a prefix trace and fill in what it counts."""
    residency = _core.Residency(run.hbm_nbytes, run.eviction)
    seen: set[int] = set()
    keys, sizes = trace.keys.tolist(), trace.nbytes.tolist()
    offsets = trace.offsets.tolist()
    hit_nbytes = read_nbytes = 0
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"num_accesses": 0, "num_hits": 0})
    for i, (first, end) in enumerate(itertools.pairwise(offsets)):
        request, nbytes = keys[first:end], sizes[first:end]
        residency.begin_event(request[0])
        num_hits = _use_prefix(residency, request, nbytes)
        run.num_hits += num_hits
        hit_nbytes += sum(nbytes[:num_hits])
        missed = zip(request[num_hits:], nbytes[num_hits:], strict=True)
        again = sum(size for key, size in missed if key in seen)
        if again:
            read_nbytes += again
            run.stall_seconds += machine.nvme.seconds(again)
        seen.update(request)
        kind = counts[Kind(int(trace.event_kind[i])).name.lower()]
        kind["num_accesses"] += end - first
        kind["num_hits"] += num_hits
    run.hits_by_kind = dict(counts)
    run.prefill = {"num_accesses": len(keys), "num_hits": run.num_hits}
    run.num_evictions = residency.num_evictions
    run.nbytes_moved = {"nvme_to_hbm": read_nbytes, "dram_to_hbm": 0, "hbm_to_dram": 0}
    run.byte_miss_ratio = 1 - hit_nbytes / max(run.nbytes_accessed, 1)


def _use_prefix(residency: _core.Residency, request: list[int], nbytes: list[int]) -> int:
    """Use a request's blocks, admitting those that are missing. Returns how many were hits.

    All are pinned together; what then has no room, or all that is larger than HBM, isn't kept.
    """
    here = [residency.find(key) is not None for key in request]
    num_hits = here.index(False) if False in here else len(here)
    pinned = [key for key, present in zip(request, here, strict=True) if present]
    for key in pinned:
        residency.use(key)
        residency.pin(key)
    for key, size, present in zip(request, nbytes, here, strict=True):
        if present:
            continue
        status, _ = residency.admit([key], [size])
        if status != "ok":
            break
        residency.mark_ready(key)
        residency.pin(key)
        pinned.append(key)
    for key in pinned:
        residency.unpin(key)
    return num_hits

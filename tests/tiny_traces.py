"""Traces of a few pages, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from tiered_mem.bounds import Bounds, bounds
from tiered_mem.simulate import LinkSpeed, Machine
from tiered_mem.trace import Form, Trace, TraceHeader

PAGE = 4096
Event = tuple[int, ...]


def machine_of(seconds_per_page: float = 1.0, latency: float = 0.0) -> Machine:
    """Copies from DRAM take half as long as reads, and computing no time unless it is given."""
    nvme = PAGE / seconds_per_page
    return Machine(LinkSpeed(nvme, latency), LinkSpeed(2 * nvme), compute=math.inf)


def trace_of(
    events: Sequence[Event],
    sizes: Sequence[int] | None = None,
    work: Sequence[float] | None = None,
    form: Form = Form.EVENTS,
    num_layers: int = 1,
) -> Trace:
    """Events one after another, the layers taking turns."""
    index = [block for event in events for block in event]
    step = [number for number, event in enumerate(events) for _ in event]
    layer = [number % num_layers for number in step]
    nbytes = [PAGE if sizes is None else sizes[block] for block in index]
    seconds = {} if work is None else {"compute_seconds": np.array(work, np.float32)}
    return Trace.from_rows(
        TraceHeader(form), index=index, step=step, layer=layer, nbytes=nbytes, **seconds
    )


def bounds_of(
    events: Sequence[Event],
    num_slots: int,
    *,
    sizes: Sequence[int] | None = None,
    work: Sequence[float] | None = None,
    form: Form = Form.EVENTS,
    machine: Machine | None = None,
    dram: int = 0,
) -> Bounds:
    trace = trace_of(events, sizes, work, form)
    return bounds(trace, hbm=num_slots * PAGE, machine=machine or machine_of(), dram=dram * PAGE)


num_slots = st.integers(1, 3)
events = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple),
    min_size=1,
    max_size=7,
)

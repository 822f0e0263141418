"""An eviction policy of your own: LRU-2, and how to see whether it is any good.

    python examples/my_policy.py

A policy is a class; `eviction=Lru2` takes it wherever a built-in's name would do: in `Runtime`, in
`tiered_mem.from_pretrained` and in `simulate`. To give it a name that commands know, put it into a
package: see examples/plugin.
"""

from __future__ import annotations

from collections.abc import Callable

from tiered_mem.policy import EvictionPolicy
from tiered_mem.simulate import LinkSpeed, Machine, simulate
from tiered_mem.trace import Form, Trace, TraceHeader


class Lru2(EvictionPolicy):
    """Evicts the block whose use before the last is longest ago: one use alone earns no place."""

    name = "lru-2"
    summary = "evicts the block whose use before the last is longest ago"
    source = "O'Neil, O'Neil and Weikum, SIGMOD 1993"

    def __init__(self) -> None:  # each tier makes its own object
        self._uses: dict[int, tuple[int, int]] = {}  # key -> when it was used: (before, last)
        self._now = 0

    def insert(self, key: int, nbytes: int) -> None:
        self._now += 1
        self._uses[key] = (0, self._now)

    def touch(self, key: int) -> None:
        self._now += 1
        self._uses[key] = (self._uses[key][1], self._now)

    def erase(self, key: int) -> None:
        del self._uses[key]

    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        # Blocks that an event still uses, or that are on their way, may not go: ask for each.
        free = [key for key in self._uses if evictable(key)]
        if not free:
            return None
        victim = min(free, key=self._uses.__getitem__)
        del self._uses[victim]  # it is gone: no erase follows
        return victim


def scans_and_a_hot_set() -> Trace:
    """Six experts that are asked for, two at a time, and between them scans of what comes once."""
    hot = [i % 6 for i in range(24)]
    index = [e for round in range(20) for e in (*hot, *range(6 + 8 * round, 14 + 8 * round))]
    step = [row // 2 for row in range(len(index))]
    return Trace.from_rows(TraceHeader(Form.EVENTS), index=index, step=step, nbytes=4096)


if __name__ == "__main__":
    machine = Machine(nvme=LinkSpeed(5e9), hbm=LinkSpeed(50e9), compute=1e12)
    for eviction in ("fifo", "lru", "arc", Lru2, "belady"):
        run = simulate(scans_and_a_hot_set(), hbm=8 * 4096, eviction=eviction, machine=machine)
        print(f"{run.eviction:12} {run.hit_rate:6.1%}")

"""Built-ins' twins in Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from tiered_mem.policy import EvictionPolicy


class PythonLru(EvictionPolicy):
    """The built-in's twin; as FIFO it has nothing to do when a block is used."""

    name = "python-lru"
    moves = True

    def __init__(self) -> None:
        self.order: OrderedDict[int, int] = OrderedDict()

    def insert(self, key: int, nbytes: int) -> None:
        assert key not in self.order
        self.order[key] = nbytes

    def touch(self, key: int) -> None:
        if self.moves:
            self.order.move_to_end(key)
        assert key in self.order

    def erase(self, key: int) -> None:
        del self.order[key]

    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        assert incoming not in self.order
        victim = next((key for key in self.order if evictable(key)), None)
        if victim is not None:
            del self.order[victim]
        return victim


class PythonFifo(PythonLru):
    name = "python-fifo"
    moves = False

"""A policy and a predictor that tiered-mem finds by their entry points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tiered_mem.policies.prefetch import Predictor, Route

from tiered_mem.policy import EvictionPolicy


class Mru(EvictionPolicy):
    """Evicts what was used last: the best there is for a cycle that is larger than the tier."""

    name = "mru"
    source = "textbook"

    def __init__(self) -> None:
        self._order: dict[int, None] = {}  # keys, the last used at the end

    def insert(self, key: int, nbytes: int) -> None:
        self._order[key] = None

    def touch(self, key: int) -> None:
        self._order[key] = self._order.pop(key)

    def erase(self, key: int) -> None:
        del self._order[key]

    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        for key in reversed(self._order):
            if key != incoming and evictable(key):
                del self._order[key]
                return key
        return None


class SameIds(Predictor):
    """Predicts that the next layer uses the experts that have this layer's ids."""

    name = "same-ids"
    source = "made up: a baseline that any real predictor should beat"

    def predict(self, route: Route) -> Sequence[int]:
        return [index for index in route.experts() if index < route.num_experts]

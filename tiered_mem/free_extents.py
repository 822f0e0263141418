"""Which parts of a file are free."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

ENDLESS = 1 << 62


class FreeExtents:
    """The parts of a file that are free, as sorted [start, end) that don't touch each other.

    The last one has no end: it begins where the file may.
    """

    def __init__(self, used: Iterable[tuple[int, int]], limit: int) -> None:
        """`used` are (offset, bytes). Nothing is taken beyond `limit`."""
        self._limit = limit
        self._starts: list[int] = []
        self._ends: list[int] = []
        at = 0
        for offset, nbytes in sorted(used):
            if offset > at:
                self.give(at, offset - at)
            at = max(at, offset + nbytes)
        self.give(at, ENDLESS)

    @property
    def tail(self) -> int:
        """Where what is free to the end begins."""
        return self._starts[-1]

    def nbytes_before(self, end: int) -> int:
        """Return what may be taken before `end`."""
        end = min(end, self._limit)
        pairs = zip(self._starts, self._ends, strict=True)
        return sum(max(0, min(stop, end) - start) for start, stop in pairs)

    def take(self, nbytes: int) -> int | None:
        """Return the offset of the first `nbytes` free bytes, now taken; None if there are none."""
        for i, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end - start >= nbytes and start + nbytes <= self._limit:
                self._cut(i, nbytes)
                return start
        return None

    def take_before(self, end: int) -> list[tuple[int, int]]:
        """Take all that is free before `end`; return (offset, bytes) of it."""
        taken = []
        while self._starts[0] < end:
            start = self._starts[0]
            taken.append((start, min(self._ends[0], end) - start))
            self._cut(0, taken[-1][1])
        return taken

    def give(self, offset: int, nbytes: int) -> None:
        """Make bytes free that aren't."""
        if nbytes == 0:
            return
        start, end = offset, offset + nbytes
        i = bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == end:
            end = self._ends[i]
            del self._starts[i], self._ends[i]
        if i > 0 and self._ends[i - 1] == start:
            self._ends[i - 1] = end
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)

    def _cut(self, i: int, nbytes: int) -> None:
        """Take the first bytes of part `i`."""
        self._starts[i] += nbytes
        if self._starts[i] == self._ends[i]:
            del self._starts[i], self._ends[i]

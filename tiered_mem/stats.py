"""What a runtime has counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiered_mem.keys import KeyArray


class Log(NamedTuple):
    """Every decision about blocks, in order: hits, misses, prefetches, evictions.

    The first key of an event goes before what happened to its keys.
    """

    happenings: npt.NDArray[np.uint8]  # index into `tiered_mem._core.HAPPENINGS`
    keys: KeyArray


@dataclass(frozen=True)
class Stats:
    """Counts since the start of a runtime; the difference of two is what happened in between.

    Accesses are keys of events. One that is on its way is no hit: `num_in_flight`. Bytes are raw
    bytes of blocks, `nbytes_moved` (by link) the bytes that really crossed it, compressed or not.
    """

    num_events: int = 0
    num_hbm_hits: int = 0
    num_in_flight: int = 0
    num_dram_hits: int = 0
    num_nvme_reads: int = 0
    num_evictions: int = 0
    nbytes_missed: int = 0
    num_hints: int = 0
    num_prefetched: int = 0
    num_prefetched_used: int = 0
    nbytes_prefetch_used: int = 0
    nbytes_prefetch_wasted: int = 0
    num_failed: int = 0
    num_repaired: int = 0
    stall_ns: int = 0
    nbytes_moved: dict[str, int] = field(default_factory=dict)

    @property
    def num_accesses(self) -> int:
        return self.num_hbm_hits + self.num_in_flight + self.num_dram_hits + self.num_nvme_reads

    @property
    def hit_rate(self) -> float:
        """Share of accesses that found their block in HBM; 0 without accesses."""
        return self.num_hbm_hits / self.num_accesses if self.num_accesses else 0.0

    @property
    def stall_seconds(self) -> float:
        """Seconds that threads waited with nothing left to compute on, added up."""
        return self.stall_ns / 1e9

    @property
    def prefetch_precision(self) -> float | None:
        """Share of prefetched blocks that an event used; None if none was prefetched."""
        return self.num_prefetched_used / self.num_prefetched if self.num_prefetched else None

    @property
    def prefetch_recall(self) -> float | None:
        """Share of the blocks not in HBM that a prefetch had on the way or in place already."""
        missing = self.num_prefetched_used + self.num_dram_hits + self.num_nvme_reads
        return self.num_prefetched_used / missing if missing else None

    def __sub__(self, earlier: Stats) -> Stats:
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            now, before = getattr(self, name), getattr(earlier, name)
            values[name] = (
                {link: n - before.get(link, 0) for link, n in now.items()}
                if isinstance(now, dict)
                else now - before
            )
        return Stats(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return counts and derived figures as plain JSON values."""
        return asdict(self) | {
            "num_accesses": self.num_accesses,
            "hit_rate": self.hit_rate,
            "stall_seconds": self.stall_seconds,
            "prefetch_precision": self.prefetch_precision,
            "prefetch_recall": self.prefetch_recall,
        }

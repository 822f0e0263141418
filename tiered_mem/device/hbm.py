"""HBM of a device that has its own memory: segments that torch allocates, given to the core.

Several segments instead of one, so that a part can be given back to torch when it runs short.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

from tiered_mem.config import format_size
from tiered_mem.errors import BudgetError

if TYPE_CHECKING:
    import torch

    from tiered_mem import _core
    from tiered_mem.device import Backend

_NUM_SEGMENTS = 16
# CUDA maps memory in pages of 2 MiB. Segments of whole pages often come to lie side by side: if
# they hold whole slots too, the slots of neighbours go on without a gap.
_PAGE_NBYTES = 2 << 20


def plan_segments(nbytes: int, slot_nbytes: int, num_segments: int = _NUM_SEGMENTS) -> list[int]:
    """Cut `nbytes` into at most `num_segments` of about one size, each of whole slots.

    None where not even one slot fits. Less than a slot is left over.
    """
    unit = math.lcm(slot_nbytes, _PAGE_NBYTES)
    if unit * num_segments > nbytes:
        unit = slot_nbytes
    num_units = nbytes // unit
    if num_units == 0:
        return []
    count = min(num_segments, num_units)
    share, more = divmod(num_units, count)
    sizes = [(share + (i < more)) * unit for i in range(count)]
    sizes[-1] += (nbytes - num_units * unit) // slot_nbytes * slot_nbytes
    return sizes


class Hbm:
    """The segments of one runtime. For one thread at a time. The core alone keeps them alive."""

    def __init__(self, backend: Backend, tiers: _core.Tiers) -> None:
        self._backend = backend
        self._tiers = tiers
        self._segments: list[weakref.ref[torch.Tensor]] = []
        self._slot_nbytes = 0

    def sizes(self) -> list[int]:
        """Return the bytes of each segment there is."""
        found = [segment for ref in self._segments if (segment := ref()) is not None]
        self._segments = [weakref.ref(segment) for segment in found]
        return [segment.numel() for segment in found]

    def provide(self, nbytes: int, slot_nbytes: int, *, or_less: bool) -> int:
        """See that there is HBM for slots of this size. Returns its bytes.

        Takes `nbytes` the first time, `or_less` if the device has no more. Raises `BudgetError`.
        """
        sizes = self.sizes()
        if not sizes:
            self._slot_nbytes = slot_nbytes
            self._add(self._allocate(plan_segments(nbytes, slot_nbytes), or_less))
            sizes = self.sizes()
            self._tiers.resize_hbm(sum(sizes))
        if max(sizes, default=0) < slot_nbytes:
            largest = format_size(max(sizes, default=nbytes))
            raise BudgetError(
                f"a block of this model has {format_size(slot_nbytes)} ({slot_nbytes} bytes), but "
                f"HBM on {self._backend.name} holds blocks of at most {largest}: give it a larger "
                "hbm, and attach the model with the largest blocks first"
            )
        return sum(sizes)

    def resize(self, nbytes: int, least: int) -> None:
        """Grow by new segments, or give back as many as bring HBM to `nbytes` at most.

        Keeps `least` bytes. Raises `BudgetError` if the device has too little; nothing changes.
        """
        sizes = self.sizes()
        have = sum(sizes)
        if not sizes:
            return  # nothing is taken yet
        if nbytes > have:
            typical = max(sizes)
            count = max(1, (nbytes - have) // typical)
            sizes = plan_segments(nbytes - have, self._slot_nbytes, count)
            self._add(self._allocate(sizes, or_less=False))
            self._tiers.resize_hbm(have + sum(sizes))
        elif nbytes < have:
            # Whichever go, as many bring HBM to `nbytes`.
            num_dropped = -(-(have - nbytes) // min(sizes))
            kept = have - sum(sorted(sizes, reverse=True)[:num_dropped])
            self._tiers.resize_hbm(max(kept, least))

    def _allocate(self, sizes: list[int], or_less: bool) -> list[torch.Tensor]:
        segments: list[torch.Tensor] = []
        for nbytes in sizes:
            try:
                segments.append(self._backend.allocate(nbytes))
            except BudgetError:
                if or_less and segments:
                    break
                raise
        return segments

    def _add(self, segments: list[torch.Tensor]) -> None:
        # In the order of their addresses: the first slots to be taken are neighbours.
        for segment in sorted(segments, key=lambda segment: segment.data_ptr()):
            self._tiers.add_segment(segment.data_ptr(), segment.numel(), segment)
            self._segments.append(weakref.ref(segment))

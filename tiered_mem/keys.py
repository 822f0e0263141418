"""Names of blocks."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

KeyArray = npt.NDArray[np.uint64]

_KIND_SHIFT, _SPACE_SHIFT, _LAYER_SHIFT = 56, 48, 32


class Kind(IntEnum):
    """What a block holds."""

    EXPERT = 1
    KV = 2
    ENGRAM = 3


class BlockKey(NamedTuple):
    """Names one block. Packs into 64 bits: kind 8, space 8, layer 16, index 32.

    `space` tells models on one runtime apart; it is 0 in a store.
    """

    kind: Kind
    layer: int
    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    space: int = 0

    def pack(self) -> int:
        """Return the key as one unsigned 64-bit integer, ordered by kind, space, layer, index."""
        return (
            self.kind << _KIND_SHIFT
            | self.space << _SPACE_SHIFT
            | self.layer << _LAYER_SHIFT
            | self.index
        )

    @classmethod
    def unpack(cls, packed: int) -> BlockKey:
        """Return the key that `packed` stands for. Raises `ValueError` on an unknown kind."""
        return cls(
            Kind(packed >> _KIND_SHIFT),
            packed >> _LAYER_SHIFT & 0xFFFF,
            packed & 0xFFFFFFFF,
            packed >> _SPACE_SHIFT & 0xFF,
        )

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.index} of layer {self.layer}"

"""Names of blocks."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

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


def pack_keys(kind: npt.ArrayLike, layer: npt.ArrayLike, index: npt.ArrayLike) -> KeyArray:
    """Return `BlockKey.pack` of arrays (or numbers) that broadcast together, in space 0, uint64."""
    kinds, layers, indices = (np.asarray(part).astype(np.uint64) for part in (kind, layer, index))
    return kinds << np.uint64(_KIND_SHIFT) | layers << np.uint64(_LAYER_SHIFT) | indices


def unpack_keys(keys: KeyArray) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return (kind uint8, layer uint16, index uint32) of packed keys, each of their shape."""
    kinds = (keys >> np.uint64(_KIND_SHIFT)).astype(np.uint8)
    return kinds, (keys >> np.uint64(_LAYER_SHIFT)).astype(np.uint16), keys.astype(np.uint32)

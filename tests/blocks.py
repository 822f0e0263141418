"""Blocks in a plain file, for tests of the core: every block's bytes are random and its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiered_mem import _core
from tiered_mem.keys import BlockKey, Kind

PAGE = _core.IO_ALIGNMENT
CHUNK = _core.CHUNK_NBYTES

Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]


def room(nbytes: int) -> int:
    """The bytes of a slot for a block of `nbytes`."""
    return (nbytes + PAGE - 1) // PAGE * PAGE


@dataclass
class Blocks:
    """Blocks, their bytes and where these lie in `path`."""

    path: Path
    bytes: dict[int, Bytes]
    extents: dict[int, _core.Extent]

    @property
    def keys(self) -> Keys:
        return np.array(list(self.bytes), np.uint64)

    def add_to(self, tiers: _core.Tiers) -> None:
        tiers.add_blocks(self.keys, list(self.extents.values()))

    def flip_bit(self, key: int, at: int = 0) -> None:
        """Damage one byte of a block in the file."""
        with self.path.open("r+b") as file:
            file.seek(self.extents[key].offset + at)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        os.sync()

    def restore(self, key: int) -> None:
        """Write a block's right bytes (again)."""
        with self.path.open("r+b") as file:
            file.seek(self.extents[key].offset)
            file.write(self.bytes[key].tobytes())
            file.flush()
            os.fsync(file.fileno())


def write_blocks(path: Path, sizes: Mapping[int, int], seed: int = 0) -> Blocks:
    """Write one block of random bytes for each (packed key, nbytes)."""
    rng = np.random.default_rng(seed)
    content = {key: rng.integers(0, 256, n, dtype=np.uint8) for key, n in sizes.items()}
    offsets = {}
    with path.open("wb") as file:
        for key, data in content.items():
            offsets[key] = file.tell()
            file.write(data.tobytes())
            file.write(bytes(room(len(data)) - len(data)))
        file.flush()
        os.fsync(file.fileno())
    source = _core.File(str(path))
    extents = {}
    for key, data in content.items():
        chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
        table = [(len(chunk), len(chunk), _core.crc32c(chunk)) for chunk in chunks]
        extents[key] = _core.Extent(
            source, 0, len(data), offsets[key], np.array(table, dtype=np.uint32)
        )
    return Blocks(path, content, extents)


def experts(layer: int, indices: range | list[int], space: int = 0) -> Keys:
    return np.array([expert(layer, index, space) for index in indices], np.uint64)


def expert(layer: int, index: int, space: int = 0) -> int:
    return BlockKey(Kind.EXPERT, layer, index, space).pack()


def uniform(num_layers: int, num_experts: int, nbytes: int) -> dict[int, int]:
    """Sizes for `write_blocks`: layers of experts of one size."""
    return {
        expert(layer, index): nbytes for layer in range(num_layers) for index in range(num_experts)
    }


def memory_of(tiers: _core.Tiers) -> Bytes:
    return np.frombuffer(tiers.hbm_memory(), np.uint8)


def wait_all(event: _core.Event) -> list[tuple[int, Exception]]:
    """Wait for every block of an event; returns (position, error) of those that failed."""
    left, failed = len(event.slots), []
    while left:
        ready, bad = event.wait_any()
        assert ready or bad
        left -= len(ready) + len(bad)
        failed += bad
    return failed


def assert_right_bytes(
    memory: Bytes, event: _core.Event, keys: Keys, blocks: Blocks, but: tuple[int, ...] = ()
) -> None:
    """Every slot of `event` holds exactly its block's bytes."""
    for position, (slot, key) in enumerate(zip(event.slots, keys.tolist(), strict=True)):
        if position not in but:
            data = blocks.bytes[key]
            assert np.array_equal(memory[slot : slot + len(data)], data), f"position {position}"

"""What every backend has to do: the host, CUDA (on a double of its driver), and torch's own way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter import in_threads

from tiered_mem.device import backend_for
from tiered_mem.device.host import HOST
from tiered_mem.device.portable import HostWork, PortableBackend
from tiered_mem.errors import (
    BudgetError,
    ChecksumError,
)
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.runtime import Runtime
from tiered_mem.space import Space
from tiered_mem.store import Store

NUM_LAYERS, NUM_EXPERTS = 3, 12
NBYTES = 5000
SLOT = 8192
GIB = 1 << 30
MIB = 1 << 20


def content(layer: int, index: int) -> np.ndarray:
    return np.random.default_rng(100 * layer + index).integers(0, 256, NBYTES, np.uint8)


def write_store(path: Path) -> None:
    with Store.open(path, mode="w", capacity=16 << 20) as writer, writer.transaction() as txn:
        for layer in range(NUM_LAYERS):
            for index in range(NUM_EXPERTS):
                txn.put(BlockKey(Kind.EXPERT, layer, index), content(layer, index))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = tmp_path_factory.mktemp("backends") / "store"
    write_store(path)
    with Store.open(path) as reader:
        yield reader


class PretendedWork(HostWork):
    """Work in host memory that is slow, keeps a log, and can fail."""

    def __init__(self) -> None:
        self.held: list[object] = []
        self.fail_with: str | None = None

    class Done:
        def __init__(self, error: str | None) -> None:
            self.error = error

        def synchronize(self) -> None:
            if self.error:
                raise RuntimeError(self.error)

    def point(self, stream: object | None = None) -> Done:
        return self.Done(self.fail_with)

    def hold(self, stream: object, point: Any) -> None:
        self.held.append(point)

    def memory(self) -> tuple[int, int]:
        return 6 * GIB, 8 * GIB


def pretended() -> PortableBackend:
    """The portable backend, whose device is host memory here."""
    return PortableBackend(torch.device("cpu"), PretendedWork())


@pytest.fixture(params=["host", "portable", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "host":
        return HOST
    if request.param == "portable":
        return pretended()
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return backend_for("cuda")


def read(space: Space, layer: int, indices: list[int]) -> list[int]:
    """An event whose every block has its own bytes; returns the positions as they came."""
    came = []
    with space.begin(layer, indices) as reading:
        for position, slot in reading:
            block = space.view(slot, NBYTES).cpu().numpy()
            assert np.array_equal(block, content(layer, indices[position]))
            came.append(position)
    assert sorted(came) == list(range(len(indices)))
    return came


# --- what every backend does ---


@pytest.mark.parametrize("dram", [0, 8 * SLOT])
def test_blocks_arrive_whatever_is_evicted(backend: Any, store: Store, dram: int) -> None:
    with Runtime(6 * SLOT, dram, device=backend) as runtime:
        space = runtime.attach(store)
        rng = np.random.default_rng(0)
        for _ in range(60):
            layer = int(rng.integers(NUM_LAYERS))
            read(space, layer, rng.permutation(NUM_EXPERTS)[: rng.integers(1, 6)].tolist())
        stats = runtime.stats()
        assert stats.num_evictions > 0
        assert (stats.num_dram_hits > 0) == (dram > 0)
        assert runtime.nbytes_used()["hbm"] <= 6 * SLOT


@pytest.mark.parametrize("slots", [1, 3, 12])
def test_an_event_larger_than_hbm_runs_in_waves(backend: Any, store: Store, slots: int) -> None:
    with Runtime(slots * SLOT, device=backend) as runtime:
        space = runtime.attach(store)
        for layer in range(NUM_LAYERS):
            read(space, layer, list(range(NUM_EXPERTS)))


def test_batches_are_the_blocks_that_came_together(backend: Any, store: Store) -> None:
    with Runtime(5 * SLOT, device=backend) as runtime:
        space = runtime.attach(store)
        indices = list(range(NUM_EXPERTS))
        seen = []
        with space.begin(1, indices) as reading:
            for positions, slots in reading.batches():
                assert len(positions) == len(slots) > 0
                for position, slot in zip(positions, slots, strict=True):
                    block = space.view(slot, NBYTES).cpu().numpy()
                    assert np.array_equal(block, content(1, position))
                seen += positions
        assert sorted(seen) == indices


def test_threads_and_models_share_a_runtime(backend: Any, store: Store) -> None:
    with Runtime(7 * SLOT, 4 * SLOT, device=backend) as runtime:
        spaces = [runtime.attach(store), runtime.attach(store)]

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(12):
                indices = rng.permutation(NUM_EXPERTS)[: rng.integers(1, NUM_EXPERTS)].tolist()
                read(spaces[seed % 2], int(rng.integers(NUM_LAYERS)), indices)

        assert in_threads([lambda seed=seed: work(seed) for seed in range(4)]) == [None] * 4
        for space in spaces:
            space.close()
        assert runtime.nbytes_used() == {"hbm": 0, "dram": 0}


def test_two_runtimes_share_a_device(backend: Any, store: Store) -> None:
    with Runtime(4 * SLOT, device=backend) as one, Runtime(4 * SLOT, device=backend) as other:
        for space in (one.attach(store), other.attach(store)):
            read(space, 0, [3, 1, 2])


def test_hbm_grows_and_shrinks_while_it_is_used(backend: Any, store: Store) -> None:
    with Runtime(4 * SLOT, device=backend) as runtime:
        space = runtime.attach(store)
        for slots in (12, 2, 30, 1, 5):
            runtime.resize(hbm=slots * SLOT)
            assert runtime.budgets.hbm == slots * SLOT
            for layer in range(NUM_LAYERS):
                read(space, layer, [layer, 11, 5])
            assert runtime.nbytes_used()["hbm"] <= slots * SLOT
        with pytest.raises(BudgetError, match=f"{SLOT} bytes"):
            runtime.resize(hbm=SLOT - 1)


def test_a_damaged_block_is_repaired_in_its_slot(backend: Any, tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        with store.snapshot() as snapshot:
            offset = snapshot.extents([BlockKey(Kind.EXPERT, 1, 4)])[0].offset
        damage(store, offset)
        mended = []

        def repair(key: BlockKey, out: np.ndarray) -> None:
            mended.append((key.layer, key.index))
            out[:] = content(key.layer, key.index)

        with Runtime(6 * SLOT, device=backend) as runtime:
            read(runtime.attach(store, repair=repair), 1, [3, 4, 5])
            assert mended == [(1, 4)]
            with pytest.raises(ChecksumError, match="no source"):
                read(runtime.attach(store), 1, [4])


def damage(store: Store, offset: int) -> None:
    (path,) = [p for p in Path(store.path).iterdir() if p.suffix == ".mdb" and "lock" not in p.name]
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_fill_reads_ahead(backend: Any, store: Store) -> None:
    with Runtime(8 * SLOT, 8 * SLOT, device=backend) as runtime:
        space = runtime.attach(store)
        space.fill([BlockKey(Kind.EXPERT, 0, i) for i in range(NUM_EXPERTS)])
        used = runtime.nbytes_used()
        assert used["hbm"] + used["dram"] >= NUM_EXPERTS * SLOT

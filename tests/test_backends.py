"""What every backend has to do: the host, CUDA (on a double of its driver), and torch's own way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter import in_threads
from driver_double import run_python

from tiered_mem import memory_watch
from tiered_mem.config import Budgets, DeviceMemory
from tiered_mem.device import backend_for
from tiered_mem.device.hbm import plan_segments
from tiered_mem.device.host import HOST
from tiered_mem.device.portable import HostWork, PortableBackend
from tiered_mem.device.segments import ALIGNMENT
from tiered_mem.errors import (
    BudgetError,
    ChecksumError,
    ConfigError,
    DeviceError,
    TransferError,
)
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.runtime import Runtime
from tiered_mem.space import Space
from tiered_mem.store import Store

#: Whether CUDA's driver is the double in this process.
ON_DOUBLE = "TIERED_MEM_CUDA_DRIVER" in os.environ

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
    if ON_DOUBLE:
        from double_backend import DoubleBackend

        return DoubleBackend()
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return backend_for("cuda")


@pytest.mark.skipif(ON_DOUBLE, reason="this is that process")
@pytest.mark.parametrize(
    "settings", ["max_delay_us=200", pytest.param("integrated=1", marks=pytest.mark.slow)]
)
def test_the_cuda_backend_on_a_double_of_its_driver(cuda_double: Path, settings: str) -> None:
    code = (
        "import sys, pytest;"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {__file__!r}, '-k', 'cuda']))"
    )
    run_python(cuda_double, code, settings, timeout=120)


def is_shared(backend: Any) -> bool:
    """Whether a GPU shares its memory with the CPU: then there is no DRAM tier, and no growth."""
    return backend.in_place and backend is not HOST


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
    if is_shared(backend) and dram:
        with pytest.raises(ConfigError, match="shares its memory"):
            Runtime(6 * SLOT, dram, device=backend)
        return
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
    dram = 0 if is_shared(backend) else 4 * SLOT
    with Runtime(7 * SLOT, dram, device=backend) as runtime:
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
    start = 30 if is_shared(backend) else 4
    with Runtime(start * SLOT, device=backend) as runtime:
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
    sizes = (16 * SLOT, 0) if is_shared(backend) else (8 * SLOT, 8 * SLOT)
    with Runtime(*sizes, device=backend) as runtime:
        space = runtime.attach(store)
        space.fill([BlockKey(Kind.EXPERT, 0, i) for i in range(NUM_EXPERTS)])
        used = runtime.nbytes_used()
        assert used["hbm"] + used["dram"] >= NUM_EXPERTS * SLOT


# --- HBM in segments ---


@pytest.mark.parametrize("slot", [4096, SLOT, 9 * MIB, 3 * MIB + 4096, 100 * MIB])
@pytest.mark.parametrize("nbytes", [0, 5000, SLOT, 17 * SLOT, 64 * MIB, 300 * MIB, 6 * GIB + 1])
def test_segments_hold_whole_slots_within_the_budget(slot: int, nbytes: int) -> None:
    sizes = plan_segments(nbytes, slot)
    assert len(sizes) <= 16
    assert all(size > 0 and size % slot == 0 for size in sizes)
    assert nbytes - slot < sum(sizes) <= nbytes
    if slot == 9 * MIB and nbytes == 6 * GIB + 1:
        assert all(size % (2 * MIB) == 0 for size in sizes[:-1])


def test_segments_are_given_back_as_hbm_shrinks(store: Store) -> None:
    backend = pretended()
    runtime = Runtime(32 * SLOT, device=backend)
    space = runtime.attach(store)
    assert runtime._hbm is not None
    assert sum(runtime._hbm.sizes()) == 32 * SLOT
    for slots in (31, 17, 16, 3):
        runtime.resize(hbm=slots * SLOT)
        assert slots - 3 < sum(runtime._hbm.sizes()) // SLOT <= slots
        read(space, 0, [1, 2])
    runtime.resize(hbm=20 * SLOT)
    assert sum(runtime._hbm.sizes()) == 20 * SLOT
    hbm = runtime._hbm
    runtime.close()
    assert hbm.sizes() == []


def test_no_memory_is_taken_before_a_model_comes(store: Store) -> None:
    with Runtime(4 * SLOT, device=pretended()) as runtime:
        assert runtime._hbm is not None and runtime._hbm.sizes() == []
        runtime.resize(hbm=6 * SLOT)
        runtime.attach(store)
        assert sum(runtime._hbm.sizes()) == 6 * SLOT


class Small(PortableBackend):
    """A device of so many bytes."""

    left = 0

    def _empty(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.left:
            raise torch.OutOfMemoryError("out of memory, says the device")
        self.left -= nbytes
        return super()._empty(nbytes)


def small(nbytes: int) -> Small:
    backend = Small(torch.device("cpu"), PretendedWork())
    backend.left = nbytes
    return backend


def test_too_little_device_memory(store: Store) -> None:
    with Runtime(32 * SLOT, device=small(10 * SLOT)) as runtime:
        with pytest.raises(BudgetError, match=r"16\.0 KiB left for HBM: 6\.0 GiB of 8\.0 GiB"):
            runtime.attach(store)
        assert runtime.largest_block() == 0
    with (
        Runtime(SLOT - 1, device=pretended()) as runtime,
        pytest.raises(BudgetError, match=f"{SLOT} bytes"),
    ):
        runtime.attach(store)
    budgets = Budgets(32 * SLOT, 0, auto_hbm=True)
    with Runtime.from_budgets(budgets, eviction="lru", device=small(31 * SLOT)) as runtime:
        read(runtime.attach(store), 0, [4, 5])
        assert 4 * SLOT <= runtime.budgets.hbm < 32 * SLOT


def test_growth_that_cant_be_had_changes_nothing(store: Store) -> None:
    backend = small(10 * GIB)
    with Runtime(8 * SLOT, device=backend) as runtime:
        space = runtime.attach(store)
        backend.left = 0
        with pytest.raises(BudgetError, match="left for HBM"):
            runtime.resize(hbm=16 * SLOT)
        assert runtime.budgets.hbm == 8 * SLOT
        read(space, 0, [0, 7])


def test_views_of_segments(store: Store) -> None:
    backend = pretended()
    segment = backend.allocate(4 * SLOT)
    address = segment.data_ptr()
    assert address % ALIGNMENT == 0
    view = backend.view(address + SLOT, 100)
    view.fill_(7)
    assert segment[SLOT : SLOT + 100].eq(7).all() and view.numel() == 100
    for first, nbytes in ((address + 3 * SLOT, 2 * SLOT), (1, 1), (address + 4 * SLOT, 1)):
        with pytest.raises(DeviceError, match="segment"):
            backend.view(first, nbytes)
    del segment, view
    with pytest.raises(DeviceError):
        backend.view(address, 1)


# --- the portable backend ---


def test_copies_wait_for_what_still_computes(store: Store) -> None:
    backend = pretended()
    with Runtime(2 * SLOT, device=backend) as runtime:
        space = runtime.attach(store)
        for index in range(NUM_EXPERTS):
            read(space, 0, [index])
    assert backend._work.held
    assert len(backend._points) < NUM_EXPERTS  # forgotten with their slots


def test_a_copy_that_fails_is_a_named_error(store: Store) -> None:
    backend = pretended()
    with Runtime(4 * SLOT, device=backend) as runtime:
        space = runtime.attach(store)
        read(space, 0, [0])
        backend._work.fail_with = "the device fell off the bus"
        with pytest.raises(TransferError, match="fell off the bus"):
            read(space, 0, [1])


def test_the_movers_end_with_their_backend() -> None:
    backend = pretended()
    core = backend.core
    assert core is not None
    del backend
    assert core.take_in() is None


# --- budgets of a device ---


def test_auto_leaves_room_on_the_device() -> None:
    device = DeviceMemory("cuda:0", available=6 * GIB, total=8 * GIB)
    assert Budgets.resolve("auto", 0, whole=3 * GIB, device=device).hbm == 3 * GIB
    everything = Budgets.resolve("auto", 0, whole=99 * GIB, device=device)
    assert everything.hbm == 6 * GIB - 256 * MIB and everything.auto_hbm
    less = Budgets.resolve("auto", 0, whole=99 * GIB, device=device, room=GIB)
    assert less.hbm == everything.hbm - GIB
    dram = Budgets.resolve(2 * GIB, "auto", whole=2 * GIB + MIB, device=device).dram
    assert dram == MIB
    with pytest.raises(BudgetError, match=r"hbm is 80\.0 GiB, more than the 8\.0 GiB of cuda:0"):
        Budgets.resolve("80GiB", 0, whole=GIB, device=device)
    with pytest.raises(BudgetError, match=r"6\.0 GiB of cuda:0 are left"):
        Budgets.resolve("auto", 0, whole=GIB, device=device, room=7 * GIB)


def test_an_auto_budget_follows_the_device(store: Store) -> None:
    budgets = Budgets(32 * SLOT, 0, auto_hbm=True)
    with Runtime.from_budgets(budgets, eviction="lru", device=pretended()) as runtime:
        runtime.attach(store)
        plenty = DeviceMemory("cuda:0", available=200 * MIB, total=8 * GIB)
        memory_watch.shrink_device(runtime, plenty)  # its room is being used
        assert runtime.budgets.hbm == 32 * SLOT
        memory_watch.shrink_device(runtime, replace(plenty, available=MIB))
        assert runtime.budgets.hbm == runtime.least_hbm() == 2 * SLOT
        memory_watch.shrink_to_fit(runtime, -GIB)  # the host's: not HBM's business
        assert runtime.budgets.hbm == 2 * SLOT

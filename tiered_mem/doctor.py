"""What a machine offers the tiers (memory, links, filesystem, budgets), and how a store is.

The way from NVMe to HBM is measured through the runtime's own transfer engine, checksums included.
The others are what the machine does: copies in host memory, writes as a pack's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from tiered_mem import _core
from tiered_mem.config import DeviceMemory, WorkingSet, format_size, memory_to_spare
from tiered_mem.errors import ConfigError, DeviceError, StoreError, StoreFullError
from tiered_mem.keys import BlockKey, KeyArray, Kind
from tiered_mem.store import Store

PROBE_NBYTES = 256 << 20
_BLOCK_NBYTES = 4 << 20
_EVENT_BLOCKS = 8
_NUM_IO_THREADS = 4
_LOCK_NBYTES = 64 << 20


@dataclass(frozen=True)
class Link:
    """A way between two tiers and what it was measured to carry."""

    name: str
    method: str
    bytes_per_second: float


@dataclass(frozen=True)
class Gpu:
    """A CUDA device. `kernels` tells what is wrong with the kernels for it, if anything is."""

    device: str
    name: str
    compute_capability: str
    driver_version: str
    free_nbytes: int
    total_nbytes: int
    shares_memory: bool
    kernels: str | None

    @property
    def memory(self) -> DeviceMemory | None:
        """Its own memory; None if it shares the CPU's."""
        if self.shares_memory:
            return None
        return DeviceMemory(self.device, self.free_nbytes, self.total_nbytes)


@dataclass(frozen=True)
class Filesystem:
    """Where a store would lie."""

    path: str
    kind: str
    device: str
    free_nbytes: int
    direct_io: bool


@dataclass(frozen=True)
class Memory:
    """Host memory. `lock_limit` is None where a process may lock any amount."""

    total_nbytes: int
    available_nbytes: int
    spare_nbytes: int
    lock_limit: int | None
    can_lock: bool
    huge_pages: str


@dataclass(frozen=True)
class StoreHealth:
    """What a store holds and lacks. `missing` is what an unfinished pack has yet to write."""

    num_blocks: int
    nbytes: int
    damaged: list[BlockKey]
    missing: list[BlockKey]

    @property
    def sound(self) -> bool:
        return not self.damaged and not self.missing


@dataclass(frozen=True)
class Advice:
    """Budgets for this machine, as `tiered_mem.from_pretrained` takes them, and why."""

    hbm: str
    dram: str
    why: str


def examine_memory() -> Memory:
    """Return what host memory there is and whether it can be pinned."""
    memory = psutil.virtual_memory()
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Memory(
        total_nbytes=memory.total,
        available_nbytes=memory.available,
        spare_nbytes=memory_to_spare(),
        lock_limit=None if limit == resource.RLIM_INFINITY else limit,
        can_lock=_can_lock(_LOCK_NBYTES),
        huge_pages=_huge_pages(),
    )


def examine_gpus() -> list[Gpu]:
    """Return the CUDA devices. Raises `DeviceError` for a driver or a device that can't be used."""
    return [_examine_gpu(ordinal) for ordinal in range(_core.cuda_device_count())]


def _examine_gpu(ordinal: int) -> Gpu:
    from tiered_mem.device import kernels  # not until there is a device

    device = _core.CudaDevice(ordinal)
    version = _core.cuda_driver_version() or 0
    capability = device.compute_capability
    problem = None
    try:
        kernels.kernel_image(capability)
    except DeviceError as error:
        problem = str(error)
    free, total = device.memory()
    return Gpu(
        device=f"cuda:{ordinal}",
        name=device.name,
        compute_capability=".".join(map(str, capability)),
        driver_version=f"{version // 1000}.{version % 1000 // 10}",
        free_nbytes=free,
        total_nbytes=total,
        shares_memory=device.integrated,
        kernels=problem,
    )


def measure_gpu(gpu: Gpu) -> Link:
    """Return the way from page-locked host memory to a GPU's own. Raises `DeviceError`."""
    measured = _core.CudaDevice(int(gpu.device.partition(":")[2])).calibrate()
    return Link(f"DRAM to {gpu.device}", "large copies", measured["in_bytes_per_second"])


def examine_filesystem(directory: str | os.PathLike[str]) -> Filesystem:
    """Return what kind of filesystem `directory` is on. Raises `ConfigError` if there is none."""
    path = _require_directory(directory)
    mounts = [p for p in psutil.disk_partitions(all=True) if path.is_relative_to(p.mountpoint)]
    mount = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    with _probe_file(path) as probe:
        direct = _core.File(str(probe)).direct
    return Filesystem(
        path=str(path),
        kind=mount.fstype if mount else "unknown",
        device=mount.device if mount else "unknown",
        free_nbytes=psutil.disk_usage(str(path)).free,
        direct_io=direct,
    )


def measure_links(
    directory: str | os.PathLike[str], *, nbytes: int = PROBE_NBYTES
) -> Iterator[Link]:
    """Yield each link as it is measured, with a file of `nbytes` in `directory` that is removed.

    What was written just now may still be in a cache of the disk or of the host under a virtual
    one, so reads of blocks written long ago can be slower.

    Raises `ConfigError` if `directory` is none, `StoreFullError` if it lacks the room, `StoreError`
    if it can't be written.
    """
    path = _require_directory(directory)
    num_blocks = max(1, nbytes // _BLOCK_NBYTES)
    free = psutil.disk_usage(str(path)).free
    if free < num_blocks * _BLOCK_NBYTES:
        raise StoreFullError(
            f"measuring takes {format_size(num_blocks * _BLOCK_NBYTES)} in {path}, which has "
            f"{format_size(free)} left: name another directory"
        )
    yield Link("DRAM to HBM", "memcpy", _measure_copy())
    block = _page_aligned(_BLOCK_NBYTES)
    block[:] = os.urandom(_BLOCK_NBYTES)
    with _probe_file(path) as probe:
        file = _core.File(str(probe))
        yield _measure_write(file, block, num_blocks)
        extents = _extents(file, block, num_blocks)
        method = "O_DIRECT read" if file.direct else "read through the page cache"
        for num_threads in (1, _NUM_IO_THREADS):
            threads = "1 I/O thread" if num_threads == 1 else f"{num_threads} I/O threads"
            yield Link("NVMe to HBM", f"{method}, {threads}", _measure_read(extents, num_threads))


def examine_store(
    path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> StoreHealth:
    """Read every block of the store at `path`. `progress` gets (bytes done, bytes in all).

    Raises what `Store.open` raises.
    """
    with Store.open(path) as store:
        damaged = store.verify(progress)
        layouts = store.metadata.get("experts", {}).get("layouts", [])
        with store.snapshot() as snapshot:
            present = set(snapshot.keys().tolist())
            sound = present - {key.pack() for key in damaged}
            nbytes = sum(snapshot.nbytes(key) for key in sound)
    promised = [
        BlockKey(Kind.EXPERT, layer, index)
        for layer, layout in enumerate(layouts)
        for index in range(layout["num_experts"])
    ]
    missing = [key for key in promised if key.pack() not in present]
    return StoreHealth(len(present), nbytes, damaged, missing)


def advise(
    spare_nbytes: int, working_set: WorkingSet | None = None, gpu: DeviceMemory | None = None
) -> Advice:
    """Return budgets for a machine with `spare_nbytes` of host memory to give, and a GPU's.

    Without a GPU both tiers would be the same memory, so a DRAM tier would only add copies.
    """
    if gpu is not None:
        return _advise_gpu(spare_nbytes, working_set, gpu)
    one_memory = "without a GPU both tiers are host memory, and a DRAM tier only adds copies"
    if working_set is None:
        return Advice(_whole_mib(spare_nbytes), "0", f"what is spare; {one_memory}")
    hbm = _whole_mib(min(spare_nbytes, working_set.experts_nbytes), round_up=True)
    if spare_nbytes >= working_set.experts_nbytes:
        return Advice(hbm, "0", f"every expert fits; {one_memory}")
    hbm = _whole_mib(spare_nbytes)
    if spare_nbytes >= working_set.cycle_nbytes:
        return Advice(hbm, "0", f"what is spare, above one token's cycle; {one_memory}")
    if spare_nbytes >= working_set.event_nbytes:
        why = "below one token's cycle: expect few hits, and use eviction per-layer(lru)"
        return Advice(hbm, "0", why)
    needed = format_size(working_set.event_nbytes)
    return Advice(hbm, "0", f"too little: one layer of one token needs {needed}; free some memory")


def _advise_gpu(spare_nbytes: int, needs: WorkingSet | None, gpu: DeviceMemory) -> Advice:
    """Return budgets by what is free now: what a model's other weights take has to come off."""
    free = max(0, gpu.headroom())
    if needs is None:
        why = f"what is free on {gpu.name}, less the model's other weights, and what is spare"
        return Advice("auto", _whole_mib(spare_nbytes), why)
    if free >= needs.experts_nbytes:
        return Advice("auto", "0", f"every expert fits on {gpu.name} beside its other weights")
    if free < needs.event_nbytes:
        needed = format_size(needs.event_nbytes)
        why = f"too little on {gpu.name}: one layer of one token needs {needed}; free some memory"
        return Advice("auto", "0", why)
    dram = _whole_mib(min(spare_nbytes, needs.experts_nbytes - free), round_up=True)
    if spare_nbytes < needs.experts_nbytes - free:
        dram = _whole_mib(spare_nbytes)
    why = f"{format_size(free)} of {gpu.name} at most, and DRAM for the rest as far as it goes"
    return Advice("auto", dram, why)


def _whole_mib(nbytes: int, *, round_up: bool = False) -> str:
    return f"{(nbytes + (round_up and (1 << 20) - 1)) >> 20}MiB"


def _require_directory(directory: str | os.PathLike[str]) -> Path:
    path = Path(directory).resolve()
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory: name one on the disk that a store would use")
    return path


@contextmanager
def _probe_file(directory: Path) -> Iterator[Path]:
    try:
        fd, name = tempfile.mkstemp(prefix=".tiered-mem-doctor-", dir=directory)
    except OSError as error:
        raise StoreError(f"{directory} can't be written: {error.strerror}") from error
    try:
        os.pwrite(fd, bytes(_core.IO_ALIGNMENT), 0)  # O_DIRECT is tried out on its first bytes
        yield Path(name)
    except OSError as error:
        raise StoreError(f"{directory} can't be written: {error.strerror}") from error
    finally:
        os.close(fd)
        os.unlink(name)


def _can_lock(nbytes: int) -> bool:
    """Try it: capabilities and cgroups decide as well as the limit does."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory = _page_aligned(nbytes)
    address = ctypes.byref(ctypes.c_char.from_buffer(memory))
    size = ctypes.c_size_t(nbytes)
    if libc.mlock(address, size) != 0:
        return False
    libc.munlock(address, size)
    return True


def _huge_pages() -> str:
    """Return the kernel's setting for transparent huge pages: always, madvise, never or unknown."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return modes.partition("[")[2].partition("]")[0] or "unknown"


def _page_aligned(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def _measure_copy() -> float:
    """Copy between buffers far larger than the caches; the median of a few rounds."""
    source, target = np.ones(_LOCK_NBYTES, np.uint8), np.ones(_LOCK_NBYTES, np.uint8)
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return _LOCK_NBYTES / sorted(seconds)[len(seconds) // 2]


def _measure_write(file: _core.File, block: memoryview, num_blocks: int) -> Link:
    fd = os.open(file.path, os.O_WRONLY | (os.O_DIRECT if file.direct else 0))
    try:
        started = time.perf_counter()
        for i in range(num_blocks):
            os.pwrite(fd, block, i * block.nbytes)
        os.fsync(fd)
        seconds = time.perf_counter() - started
    finally:
        os.close(fd)
    method = "O_DIRECT write" if file.direct else "write through the page cache"
    return Link("DRAM to NVMe", method, num_blocks * block.nbytes / seconds)


def _extents(file: _core.File, block: memoryview, num_blocks: int) -> list[_core.Extent]:
    chunks = [block[i : i + _core.CHUNK_NBYTES] for i in range(0, block.nbytes, _core.CHUNK_NBYTES)]
    table = np.array([(c.nbytes, c.nbytes, _core.crc32c(c)) for c in chunks], np.uint32)
    return [_core.Extent(file, 0, block.nbytes, i * block.nbytes, table) for i in range(num_blocks)]


def _measure_read(extents: list[_core.Extent], num_io_threads: int) -> float:
    """Acquire all blocks once, in random order, in events of some, through an HBM of one event."""
    keys = np.array([BlockKey(Kind.EXPERT, 0, i).pack() for i in range(len(extents))], np.uint64)
    hbm_nbytes = _EVENT_BLOCKS * _BLOCK_NBYTES
    tiers = _core.Tiers(hbm=hbm_nbytes, dram=0, num_io_threads=num_io_threads)
    try:
        tiers.add_blocks(keys, extents)
        order = np.random.default_rng(0).permutation(keys)
        started = time.perf_counter()
        for first in range(0, len(order), _EVENT_BLOCKS):
            _acquire(tiers, order[first : first + _EVENT_BLOCKS])
        return len(extents) * _BLOCK_NBYTES / (time.perf_counter() - started)
    finally:
        tiers.close()


def _acquire(tiers: _core.Tiers, keys: KeyArray) -> None:
    event = tiers.acquire(keys)
    try:
        ready, failed = event.wait_any()
        while ready or failed:
            for _, error in failed:
                raise error
            ready, failed = event.wait_any()
    finally:
        event.release()

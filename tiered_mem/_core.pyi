# The C++ extension, built from csrc/.

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from tiered_mem.errors import TieredMemError

# --- store ---

CHUNK_NBYTES: int
IO_ALIGNMENT: int

def crc32c(data: Buffer, seed: int = 0) -> int: ...
def crc32c_by_implementation(data: Buffer, seed: int = 0) -> dict[str, int]: ...
def async_reads_available() -> bool: ...

class File:
    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def direct(self) -> bool: ...

class FileWriter:
    """Writes to a file by O_DIRECT, several at once. Raises OSError. One thread at a time."""

    def __init__(self, path: str) -> None: ...
    @property
    def direct(self) -> bool: ...
    def reserve(self, offset: int, nbytes: int) -> None: ...
    def truncate(self, nbytes: int) -> None: ...
    def take(self, sizes: Sequence[int]) -> list[npt.NDArray[np.uint8]]: ...
    def write(self, offsets: Sequence[int]) -> None: ...
    def write_from(
        self, blocks: Sequence[npt.NDArray[np.uint8]], offsets: Sequence[int]
    ) -> int: ...
    def wait(self, number: int) -> None: ...
    def flush(self) -> None: ...
    def discard(self) -> None: ...

class Extent:
    def __init__(
        self, file: File, codec: int, nbytes: int, offset: int, table: npt.NDArray[np.uint32]
    ) -> None: ...
    @property
    def file(self) -> File: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def codec(self) -> int: ...
    @property
    def num_chunks(self) -> int: ...
    @property
    def stored_nbytes(self) -> int: ...

def parse_entry(file: File, key: bytes, packed: Buffer) -> Extent: ...
def read_block(extent: Extent, out: Buffer) -> None: ...

# --- residency without bytes ---

class Residency:
    """One tier's residency and policy, without bytes. Not for several threads."""

    def __init__(self, budget: int, eviction: str = "lru", reserved: int = 0) -> None: ...
    def admit(
        self, keys: npt.ArrayLike, nbytes: npt.ArrayLike, guessed: bool = False
    ) -> tuple[Literal["ok", "busy", "too_large"], list[int]]:
        """Make room for all blocks, in state loading, or change nothing: (outcome, victims)."""
    def find(
        self, key: int
    ) -> tuple[int, int, int, Literal["loading", "ready", "failed"], bool] | None:
        """Return (slot, slot_nbytes, pins, state, guessed)."""
    def use(self, key: int) -> None: ...
    def pin(self, key: int) -> None: ...
    def unpin(self, key: int) -> None: ...
    def mark_ready(self, key: int) -> None: ...
    def protect(self, key: int, on: bool) -> None: ...
    def begin_event(self, key: int) -> None: ...
    def hint(self, key: int, probability: float) -> None: ...
    def drop(self, key: int) -> None: ...
    def resize(self, budget: int) -> bool:
        """Return False while pins hold slabs back: call again when they are gone."""
    def keys(self) -> list[int]: ...
    def __len__(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def nbytes_used(self) -> int: ...
    @property
    def nbytes_cut(self) -> int: ...
    @property
    def num_evictions(self) -> int: ...

# --- replay: a policy alone ---

@overload
def count_misses(eviction: str, keys: npt.ArrayLike, num_slots: int) -> int:
    """Return how many of these requests miss in a cache of so many equal slots.

    Raises `ConfigError`, and `PolicyError` if a plug-in misbehaves.
    """

@overload
def count_misses(
    eviction: str, keys: npt.ArrayLike, budget: int, nbytes: npt.ArrayLike
) -> tuple[int, int]:
    """Return (requests, bytes) that miss in a cache of so many bytes.

    `nbytes` has the size of each request's block. One larger than the budget passes by.
    """

# --- runtime ---

class Memory(Buffer):
    """A tier's memory, alive as long as a view of it."""

    @property
    def nbytes(self) -> int: ...

class Event:
    """A layer step's keys, pinned in HBM until `release`."""

    @property
    def slots(self) -> list[int]:
        """Byte offsets in HBM, by position."""
    def wait_any(self, compute: int = 0) -> tuple[list[int], list[tuple[int, TieredMemError]]]:
        """Wait for (positions newly in place, [(position, error)]); both empty after the last.

        Raises `RuntimeClosedError`, `ConfigError` after `release`.
        """
    def repaired(self, position: int) -> None:
        """Say that the caller has filled the slot of a failed position. Raises `IndexError`."""
    def release(self, compute: int = 0) -> None:
        """End the pins. The slots change once `compute` has done what it was given until now."""

class Mark:
    """A point in a device's work."""

class Pin:
    """Keeps host memory page-locked while it lives."""

    def release(self) -> None:
        """End it now."""

class Device:
    """What copies between tiers' memories. Addresses and sizes in bytes; safe between threads."""

    @property
    def host_accessible(self) -> bool:
        """Whether its memory is host memory."""
    @property
    def asynchronous(self) -> bool:
        """Whether `copy` returns before the bytes have arrived."""
    @property
    def stream_ordered(self) -> bool:
        """Whether computing waits for copies by itself."""
    def allocate(self, nbytes: int) -> Memory:
        """Return memory for a tier.

        Raises `BudgetError`, `DeviceError` where it comes in segments instead.
        """
    def allocate_staging(self, nbytes: int) -> Memory:
        """Return host memory that copies reach without a detour. Raises `BudgetError`."""
    def copy(
        self,
        direction: Literal["in", "out"],
        copies: npt.ArrayLike,
        after: Sequence[Mark | None] = (),
    ) -> Mark | None:
        """Start a batch of copies, [count, 3] of (target, source, nbytes), behind `after`.

        The mark is reached when all have arrived; None: they have. Raises `TransferError`.
        """
    def reached(self, mark: Mark | None) -> bool:
        """Return without waiting. Raises `TransferError` if the device failed."""
    def wait(self, mark: Mark | None) -> None:
        """Raises `TransferError` if the device failed."""
    def mark_compute(self, compute: int = 0) -> Mark | None:
        """Return a point behind all that was given to `compute` until now."""
    def hold_compute(self, compute: int, mark: Mark | None) -> None:
        """Let what is given to `compute` from now on come after a mark."""
    def reaches(self, address: int, nbytes: int) -> bool:
        """Return whether copies from and to this host memory need no staging."""
    def pin(self, address: int, nbytes: int) -> Pin:
        """Page-lock a range of host memory, page-aligned. Raises `DeviceError`."""

class QueueDevice(Device):
    """A device whose copies are made by whoever takes its commands."""

    def __init__(self) -> None: ...
    def add_pinned(self, address: int, nbytes: int, owner: object) -> None:
        """Stage in this page-locked memory from now on. Raises `ConfigError` if there is some."""
    def take_in(self) -> list[tuple[int, list[tuple[int, int, int]], list[int]]] | None:
        """Wait for (id, [(target, source, nbytes)], points to wait for); None once it is closed."""
    def take_out(self) -> list[tuple[int, list[tuple[int, int, int]], list[int]]] | None: ...
    def complete(self, id: int) -> None: ...
    def fail(self, id: int, message: str) -> None: ...
    def take_forgotten(self) -> list[int]:
        """Return the points that nobody will ask for any more."""
    def close(self, message: str) -> None:
        """Fail what is under way and all that comes."""

def host_device() -> Device: ...
def cuda_driver_version() -> int | None:
    """Return CUDA's version in the driver, 12080 for 12.8; None without a driver."""

def cuda_device_count() -> int:
    """Return how many CUDA devices this process sees; 0 without a driver.

    Raises `DeviceError` for a driver that can't be used.
    """

class CudaDevice(Device):
    """A device of NVIDIA's, by its primary context, which is torch's.

    `compute` is a stream's handle. Between multiprocessing's forks it can't be shared: start
    children by "spawn".
    """

    def __init__(self, ordinal: int = 0, copy_method: str = "auto") -> None:
        """`copy_method` is "engine", "batch", "kernel", or "auto": the fastest, by `calibrate`.

        Raises `DeviceError` without driver, with one older than CUDA 12.0, and for an ordinal out
        of range; `ConfigError`.
        """
    @property
    def name(self) -> str: ...
    @property
    def driver_version(self) -> int: ...
    @property
    def compute_capability(self) -> tuple[int, int]: ...
    @property
    def integrated(self) -> bool:
        """Whether it shares its memory with the CPU."""
    @property
    def pci_bus_id(self) -> str: ...
    def memory(self) -> tuple[int, int]:
        """Return the bytes of device memory: (free, total)."""
    def load_kernels(self, image: bytes) -> None:
        """Load a cubin, a fatbin or PTX made of csrc/kernels.cu. Raises `DeviceError`."""
    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[int],
        compute: int = 0,
    ) -> None:
        """Queue a loaded kernel: 3 numbers each of blocks and threads; addresses and integers.

        Raises `DeviceError` without such a kernel, `TransferError`.
        """
    def calibrate(self) -> dict[str, Any]:
        """Measure all ways of copying, which takes about a second and 64 MiB of device memory.

        "times" has rows of (direction, method, nbytes of a block, num_copies, seconds);
        "in_bytes_per_second" and "duplex_bytes_per_second" the rate of large copies in alone and
        beside copies out. Raises `DeviceError`, `BudgetError`, `TransferError`.
        """
    def set_calibration(self, table: Mapping[str, Any]) -> None:
        """Choose ways of copying by a table of `calibrate`. Raises `ConfigError`."""
    def copy_method(self, direction: Literal["in", "out"], nbytes: int, num_copies: int) -> str:
        """Return how so many blocks of pinned memory, of `nbytes` each, would be copied."""

class Tiers:
    """HBM, DRAM and the links to the store. Sizes in bytes."""

    def __init__(
        self,
        *,
        hbm: int,
        dram: int,
        hbm_reserved: int = 0,
        dram_reserved: int = 0,
        eviction: str = "lru",
        num_io_threads: int = 4,
        virtual_links: Mapping[str, tuple[float, float]] | None = None,
        future: npt.ArrayLike | None = None,
        device: Device | None = None,
        watchdog_seconds: float = 60.0,
        copy_back: bool = True,
    ) -> None:
        """Raises `ConfigError`, `BudgetError`.

        HBM is the memory of `device`, None: host memory. On one whose memory isn't the host's it
        comes by `add_segment`. A device that moves nothing for `watchdog_seconds` has failed.
        Without `copy_back` DRAM keeps what is read through it rather than what HBM lets go.

        With `virtual_links`, (bytes per second, seconds of latency) by link, no bytes move and time
        passes on a virtual clock: for one thread. `future` has the keys of all uses to come, in
        order, for eviction="belady".
        """
    def add_blocks(self, keys: npt.ArrayLike, extents: Sequence[Extent]) -> None:
        """Tell where blocks come from. Raises `ConfigError`."""
    def add_segment(self, address: int, nbytes: int, owner: object) -> None:
        """Give HBM memory of the device. Slots in it are addresses. Raises `ConfigError`.

        `owner` holds it until a smaller budget or the runtime's end lets it go.
        """
    def add_virtual_blocks(self, keys: npt.ArrayLike, nbytes: npt.ArrayLike) -> None:
        """Tell of blocks that lie nowhere, for virtual links. Raises `ConfigError`."""
    def remove_space(self, space: int) -> None:
        """Forget a model's blocks, waiting for its transfers and events."""
    def remove_blocks(self, keys: npt.ArrayLike) -> None:
        """Forget these blocks, waiting for their transfers and events. No more may come."""
    def create(self, keys: npt.ArrayLike, stream: int = 0, compute: int = 0) -> Event:
        """Pin slots for blocks that aren't in HBM, for the caller to fill.

        `Event.repaired` says which are. Those that aren't filled are dropped at the event's
        release. Raises as `acquire` does, and `ConfigError` if a block is in HBM.
        """
    @overload
    def acquire(
        self, keys: npt.ArrayLike, stream: int = 0, wait: Literal[True] = True
    ) -> Event: ...
    @overload
    def acquire(self, keys: npt.ArrayLike, stream: int = 0, *, wait: bool) -> Event | None: ...
    @overload
    def acquire(self, keys: npt.ArrayLike, stream: int, wait: bool) -> Event | None:
        """Pin all keys of an event and start what is missing; None if that had to wait.

        Raises `EventTooLargeError`, `ConfigError` for unknown or repeated keys,
        `RuntimeClosedError`.
        """
    def acquire_resident(self, keys: npt.ArrayLike, stream: int = 0) -> Event | None:
        """Pin the blocks if all are in HBM and ready, or None. Counts nothing: see `note_uses`."""
    def note_uses(self, keys: npt.ArrayLike) -> None:
        """Count an event that used these blocks in HBM, and tell the policy."""
    def hint(self, keys: npt.ArrayLike, stream: int = 0, exact: bool = False) -> None:
        """Predict the next event of one layer in `stream`, likeliest block first."""
    def announce(self, keys: npt.ArrayLike, stream: int = 0) -> list[bool]:
        """Settle hints by all keys of an event that will be acquired in several waves.

        Returns which of them are in HBM or on their way there.
        """
    def resident(self, key: int) -> bool: ...
    def num_resident(self, keys: npt.ArrayLike) -> int: ...
    def max_event(self, nbytes: int) -> int:
        """Return how many blocks of `nbytes` an event can have."""
    def resize_hbm(self, nbytes: int) -> bool:
        """Return False if pins or transfers hold memory back until they end."""
    def resize_dram(self, nbytes: int) -> bool: ...
    def pin_dram(self, nbytes: int) -> int:
        """Page-lock so many bytes more of DRAM's used memory; return how many, 0: all is.

        Raises `DeviceError`.
        """
    def throttle(self, link: str, bytes_per_second: float) -> None: ...
    def now(self) -> float:
        """Return the seconds on the runtime's clock."""
    def advance(self, seconds: float) -> None:
        """Let time pass on a virtual clock. Raises `ConfigError` on a real one."""
    def keep_log(self, on: bool) -> None:
        """Start or end keeping a log of what happens to blocks."""
    def take_log(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
        """Return (index into `HAPPENINGS`, key) of what was logged since the last call."""
    def stats(self) -> dict[str, Any]: ...
    def precision(self) -> dict[int, tuple[int, int, bool]]:
        """Return, by partition (key >> 32), (hints, hints that were right, hints pay)."""
    def hbm_memory(self) -> Memory: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None:
        """Cancel transfers, wake waiting events with `RuntimeClosedError`, give memory up."""

HAPPENINGS: tuple[str, ...]

# --- policies ---

class Evictable:
    """Says whether a block may be evicted now. Given to `EvictionPolicy.evict`."""

    def __call__(self, key: int) -> bool: ...

def register_eviction(name: str, factory: Callable[[], Any]) -> None:
    """Make a policy in Python known. Raises `ConfigError` for a built-in's name."""

def eviction_policies() -> list[tuple[str, str, str]]:
    """Return (name, summary, source) of every policy."""

def check_eviction(spec: str) -> None:
    """Raises `ConfigError` if there is no such policy."""

# --- bounds ---

class Future:
    """A trace that is known in advance: accesses to blocks 0 to len(sizes) - 1, cut into events.

    Raises `ConfigError` if the offsets cut nothing, a block has no size or an event it twice.
    """

    def __init__(
        self,
        offsets: npt.NDArray[np.int64],
        blocks: npt.NDArray[np.uint32],
        sizes: npt.NDArray[np.uint64],
    ) -> None: ...

def belady(
    future: Future, *, capacity: int, pinned_nbytes: int, divisible: bool
) -> npt.NDArray[np.uint64]:
    """Return, by access, the bytes that were missing. Events up to `pinned_nbytes` stay whole."""

def least_seconds(
    future: Future,
    *,
    capacity: int,
    pinned_nbytes: int,
    bytes_per_second: float,
    latency: float,
    work: npt.NDArray[np.float64],
) -> float:
    """Return a time before which the events can't have ended; see `tiered_mem.bounds`."""

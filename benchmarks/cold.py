"""Getting a file out of the page cache, and proving that it is out.

`posix_fadvise(DONTNEED)` alone leaves every page that some process has mapped, as a store's readers
do. `madvise(MADV_PAGEOUT)` unmaps our own first; pages mapped by another process stay, and
`cached_nbytes` shows them. Nothing here reaches a cache below the machine, such as the host's under
a virtual disk: read the same file by raw O_DIRECT twice and compare (`bench_store.py` does).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Iterable
from pathlib import Path

_SYS_CACHESTAT = 451  # the same on every architecture; Linux 6.5
_MADV_PAGEOUT = 21
_PIECE_NBYTES = 4 << 20  # no less: the kernel drops no part of a large folio

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def cached_nbytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes of a file are in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        whole, result = _Range(0, 0), _CacheStat()
        arguments = ctypes.byref(whole), ctypes.byref(result), ctypes.c_uint(0)
        if _libc.syscall(ctypes.c_long(_SYS_CACHESTAT), ctypes.c_int(fd), *arguments) == 0:
            return int(result.cached) * mmap.PAGESIZE
        return _mincore_nbytes(fd)
    finally:
        os.close(fd)


def drop(paths: Iterable[str | os.PathLike[str]], *, keep_share: float = 0.0) -> int:
    """Write files back and drop them from the page cache. Return the bytes that stayed cached.

    With `keep_share` that share of each file, always the same pieces of 4 MiB all over it, keeps
    what it has in the cache: called again and again, that is a page cache with room for this much.
    """
    left = 0
    for path in map(Path, paths):
        ranges = _ranges_to_drop(path.stat().st_size, keep_share)
        _page_out_own_maps(path, ranges)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            for start, end in ranges:
                os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        left += cached_nbytes(path)
    return left


def read_ahead_kb(path: str | os.PathLike[str]) -> int | None:
    """Return the readahead of the device under a file, in KiB: what one touched page may cost."""
    device = os.stat(path).st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for folder in (node, node.parent):  # a partition's queue belongs to its disk
        setting = folder / "queue" / "read_ahead_kb"
        if setting.exists():
            return int(setting.read_text())
    return None


def block_read_nbytes() -> int:
    """Return the bytes this process has had fetched from storage since it began."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def _ranges_to_drop(size: int, keep_share: float) -> list[tuple[int, int]]:
    """Return byte ranges [start, end) that make up all but `keep_share` of a file."""
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if keep_share == 0:
        return [(0, size)]
    starts = range(0, size, _PIECE_NBYTES)
    kept = set(random.Random(0).sample(starts, round(len(starts) * keep_share)))
    return [(s, min(s + _PIECE_NBYTES, size)) for s in starts if s not in kept]


def _page_out_own_maps(path: Path, ranges: list[tuple[int, int]]) -> None:
    resolved = str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == resolved:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            base = start - int(fields[2], 16)  # where the file's first byte would be
            for first, last in ranges:
                low, high = max(start, base + first), min(end, base + last)
                if low < high and _libc.madvise(
                    ctypes.c_void_p(low), ctypes.c_size_t(high - low), _MADV_PAGEOUT
                ):
                    raise OSError(ctypes.get_errno(), f"madvise(MADV_PAGEOUT) on {path}")


def _mincore_nbytes(fd: int) -> int:
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    pages = -(-size // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(
        None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0)
    )
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident)
    finally:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(byte & 1 for byte in resident) * mmap.PAGESIZE

"""How fast new bytes reach the disk by O_DIRECT, with nothing else done to them."""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path

# (writers, bytes a write)
WAYS = ((1, 4 << 20), (4, 1 << 20), (2, 8 << 20))


def best_rate(path: Path, nbytes: int) -> float:
    """Return bytes per second of the fastest of `WAYS`; the file is new each time, and removed."""
    return max(rate(path, *way, nbytes=nbytes) for way in WAYS)


def rate(path: Path, num_writers: int, piece: int, *, nbytes: int) -> float:
    """Return bytes per second of `num_writers` threads, with the disk told to keep them."""
    piece = min(piece, max(4096, nbytes // num_writers // 4096 * 4096))
    places = range(0, nbytes // piece * piece, piece)
    memory = mmap.mmap(-1, max(piece, 4 << 20))
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(os.urandom(1 << 20) * (len(memory) >> 20))
    buffer = memoryview(memory)[:piece]
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)

    def write(first: int) -> None:
        for place in places[first::num_writers]:
            if os.pwritev(fd, [buffer], place) != piece:
                raise OSError(f"short write of {path} at {place}")

    try:
        writers = [threading.Thread(target=write, args=(n,)) for n in range(num_writers)]
        start = time.perf_counter()
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        os.fdatasync(fd)
        return len(places) * piece / (time.perf_counter() - start)
    finally:
        os.close(fd)
        os.unlink(path)

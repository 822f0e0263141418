"""How fast a file comes off the disk by O_DIRECT, with nothing else done to it."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from pathlib import Path

# (readers, bytes a read)
WAYS = ((4, 1 << 20), (8, 1 << 20), (4, 4 << 20), (2, 16 << 20))
_TOTAL_NBYTES = 256 << 20
_HUGE_NBYTES = 4 << 20


def best_rate(path: Path, *, total_nbytes: int = _TOTAL_NBYTES) -> float:
    """Return bytes per second of the fastest of `WAYS` on random places of the file."""
    size = path.stat().st_size
    fitting = [way for way in WAYS if way[1] * way[0] <= size] or [(1, 4096)]
    return max(rate(path, *way, total_nbytes=total_nbytes) for way in fitting)


def rate(path: Path, num_readers: int, nbytes: int, *, total_nbytes: int) -> float:
    """Return bytes per second of `num_readers` threads reading `nbytes` at a time by O_DIRECT."""
    places = list(range(0, path.stat().st_size - nbytes + 1, nbytes))
    random.shuffle(places)
    places = places[: max(1, total_nbytes // nbytes)]
    waiting, lock = iter(places), threading.Lock()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    # As the runtime's own memory: in huge pages where there are any, and there before the clock
    # starts. Page faults and the pinning of small pages would make the limit too low.
    buffers = [_buffer(nbytes) for _ in range(num_readers)]

    def read(buffer: memoryview) -> None:
        while True:
            with lock:
                place = next(waiting, None)
            if place is None:
                return
            if os.preadv(fd, [buffer], place) != nbytes:
                raise OSError(f"short read of {path} at {place}")

    try:
        readers = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return len(places) * nbytes / (time.perf_counter() - start)
    finally:
        os.close(fd)


def _buffer(nbytes: int) -> memoryview:
    memory = mmap.mmap(-1, max(nbytes, _HUGE_NBYTES))  # smaller ones aren't aligned to huge pages
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(len(memory)))
    return memoryview(memory)[:nbytes]

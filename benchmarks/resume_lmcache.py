"""Run by bench_resume.py with an interpreter that has LMCache: its local disk backend.

    PYTHON resume_lmcache.py DIRECTORY CHUNKS BYTES_A_CHUNK ROUNDS

LMCache's index of that backend is in memory, so a new process finds nothing: what is measured is
writing chunks and reading them back, cold, in one process, by O_DIRECT, with its CPU tier off.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cold
import torch

logging.disable(logging.CRITICAL)


def main() -> None:
    from lmcache import __version__

    directory, num_chunks, nbytes, num_rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    rounds = []
    for number in range(num_rounds):
        rounds.append(one_round(loop, directory, number, num_chunks, nbytes))
        shutil.rmtree(directory)
    loop.call_soon_threadsafe(loop.stop)
    total = num_chunks * nbytes
    rates = {
        f"{name}_mb_per_s": statistics.median(total / r[name] for r in rounds) / 1e6
        for name in ("save", "save_synced", "load")
    }
    print(json.dumps({"version": __version__, "summary": rates, "rounds": rounds}))


def one_round(
    loop: Any, directory: Path, number: int, num_chunks: int, nbytes: int
) -> dict[str, float]:
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
    from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

    gib = num_chunks * nbytes / 2**30
    config = LMCacheEngineConfig.from_defaults(
        local_cpu=False,
        max_local_cpu_size=2 * gib + 0.25,
        local_disk=f"file://{directory}/",
        max_local_disk_size=2 * gib + 0.25,
        extra_config={"use_odirect": True},
    )
    directory.mkdir(parents=True)
    elements = nbytes // 4
    shape = (1, 2, elements // 2, 1, 1)
    metadata = LMCacheMetadata("m", 1, 1, 0, 0, torch.float32, shape)
    memory = LocalCPUBackend(config, metadata, "cpu")
    disk = LocalDiskBackend(config, loop, memory, "cpu")
    keys = [CacheEngineKey("m", 1, 0, 1000 * number + i, torch.float32) for i in range(num_chunks)]
    objects = []
    for _ in keys:
        chunk = memory.allocate(torch.Size([elements]), torch.float32, MemoryFormat.KV_2LTD)
        chunk.tensor.normal_()
        objects.append(chunk)
    left, done = [num_chunks], threading.Event()

    def written(_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            done.set()

    start = time.perf_counter()
    disk.batched_submit_put_task(keys, objects, on_complete_callback=written)
    if not done.wait(300):
        raise SystemExit("LMCache wrote no chunk in 300 s")
    saved = time.perf_counter() - start
    files = [path for path in directory.rglob("*") if path.is_file()]
    sync(files)
    synced = time.perf_counter() - start
    expected = objects[-1].tensor.clone()
    for chunk in objects:
        chunk.ref_count_down()
    cold.drop(files)
    start = time.perf_counter()
    loaded = disk.batched_get_blocking(keys)
    seconds = time.perf_counter() - start
    if any(chunk is None for chunk in loaded) or not torch.equal(loaded[-1].tensor, expected):
        raise SystemExit("LMCache didn't return what it was given")
    disk.close()
    memory.close()
    return {"save": saved, "save_synced": synced, "load": seconds}


def sync(files: list[Path]) -> None:
    """Make the files durable, which LMCache leaves to the kernel."""
    import os

    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.close(fd)


if __name__ == "__main__":
    main()

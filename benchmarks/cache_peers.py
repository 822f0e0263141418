"""libCacheSim, the peer of the replay benchmarks, and the traces that both sides read.

libCacheSim (PyPI libcachesim, GPL-3) is no part of the project: install it beside to compare.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem.trace_formats.oracle_general import NEVER, RECORD

Keys = npt.NDArray[np.uint64]

#: libCacheSim's class for our policies.
PEERS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "clock": "Clock",
    "sieve": "Sieve",
    "arc": "ARC",
    "belady": "Belady",
    "slru": "SLRU",
    "2q": "TwoQ",
    "lirs": "LIRS",
    "lfu": "LFU",
    "s3-fifo": "S3FIFO",
    "w-tinylfu": "WTinyLFU",
}
SECONDS_A_COUNT = 60


def libcachesim() -> Any:
    """Return the module, or None, which is said."""
    try:
        import libcachesim
    except ImportError:
        print("libcachesim isn't installed: our figures stand alone", file=sys.stderr)
        return None
    return libcachesim


def zipf(num_requests: int, num_keys: int, seed: int = 0) -> Keys:
    """Return independent requests by Zipf's law with exponent 1; the keys' order says nothing."""
    random = np.random.default_rng(seed)
    cumulated = np.cumsum(1 / np.arange(1, num_keys + 1))
    ranks = np.searchsorted(cumulated, random.random(num_requests) * cumulated[-1])
    return random.permutation(num_keys).astype(np.uint64)[ranks]


def write_requests(path: Path, keys: Keys) -> None:
    """Write blocks of one byte as libCacheSim's oracleGeneral, with the next use of each."""
    requests = np.zeros(len(keys), RECORD)
    requests["time"] = np.arange(len(keys))
    requests["id"], requests["nbytes"], requests["next"] = keys, 1, NEVER
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    requests["next"][order[again]] = order[again + 1]
    requests.tofile(path)


def peer_misses(module: Any, cache: Any, path: Path) -> tuple[int, float]:
    """Replay a file in libCacheSim's own loop. Return (misses, seconds)."""
    kind = module.TraceType.ORACLE_GENERAL_TRACE
    reader = module.TraceReader(str(path), trace_type=kind)
    start = time.perf_counter()
    ratio, _ = cache.process_trace(reader)
    seconds = time.perf_counter() - start
    return round(ratio * reader.get_num_of_req()), seconds


def peer_cache(module: Any, policy: str, num_slots: int) -> Any:
    """Make its cache, with a hash table that fits so many blocks."""
    return getattr(module, PEERS[policy])(num_slots, hashpower=hashpower(num_slots))


def hashpower(num_slots: int) -> int:
    return max(10, math.ceil(math.log2(num_slots)))


def peer_plug_in(module: Any, num_slots: int) -> Any:
    """Make its Python plug-in: LRU by an ordered dict, as `PythonLru` is ours."""
    return module.PluginCache(
        num_slots,
        lambda parameters: OrderedDict(),
        lambda keys, request: keys.move_to_end(request.obj_id),
        lambda keys, request: keys.__setitem__(request.obj_id, None),
        lambda keys, request: keys.popitem(last=False)[0],
        lambda keys, key: keys.pop(key, None),
        lambda keys: None,
        hashpower=hashpower(num_slots),
    )


def count_apart(policy: str, path: Path, sizes: list[int]) -> list[int | None]:
    """Return libCacheSim's misses by size, each counted in a process of its own.

    None where that ends badly: some of its policies crash or hang at a few slots.
    """
    return [_count_apart(policy, path, num_slots) for num_slots in sizes]


def _count_apart(policy: str, path: Path, num_slots: int) -> int | None:
    command = [sys.executable, __file__, policy, str(path), str(num_slots)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_A_COUNT)
    except subprocess.TimeoutExpired:
        return None
    return int(json.loads(done.stdout)) if done.returncode == 0 and done.stdout else None


if __name__ == "__main__":
    _policy, _path, _num_slots = sys.argv[1:]
    _module = libcachesim()
    _cache = peer_cache(_module, _policy, int(_num_slots))
    print(json.dumps(peer_misses(_module, _cache, Path(_path))[0]))

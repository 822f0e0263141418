"""The golden miss counts of test_replay.py are libCacheSim's (GPL-3: a cross-check, no part of the
package), exactly.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flat_traces import NUM_SLOTS, TRACES, Keys
from test_replay import GOLDEN

libcachesim = pytest.importorskip("libcachesim", reason="optional cross-check (GPL-3)")

PEERS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "clock": "Clock",
    "sieve": "Sieve",
    "arc": "ARC",
    "belady": "Belady",
}


def write_oracle_general(path: Path, keys: Keys) -> None:
    """Write libCacheSim's records; `nx` is the position of the same key's next request."""
    record = [("t", "<u4"), ("id", "<u8"), ("sz", "<u4"), ("nx", "<i8")]
    requests = np.zeros(len(keys), record)
    requests["t"], requests["id"], requests["sz"] = np.arange(len(keys)), keys, 1
    later: dict[int, int] = {}
    for position in range(len(keys) - 1, -1, -1):
        key = int(keys[position])
        requests["nx"][position] = later.get(key, np.iinfo(np.int64).max)
        later[key] = position
    requests.tofile(path)


@pytest.mark.parametrize("trace", TRACES)
def test_equal_misses(trace: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.oracleGeneral"
    write_oracle_general(path, TRACES[trace])
    kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE
    for policy, peer in PEERS.items():
        counts = []
        for num_slots in NUM_SLOTS:
            cache = getattr(libcachesim, peer)(num_slots, hashpower=12)
            ratio, _ = cache.process_trace(libcachesim.TraceReader(str(path), trace_type=kind))
            counts.append(round(ratio * len(TRACES[trace])))
        assert counts == GOLDEN[trace, policy], policy

"""A writer killed at any moment leaves whole prefixes: every record with all its bytes.

Run as a program, this file forks writers that save and evict, kills each at a random moment, and
has another fresh process check what is there.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
from test_prefixes import check_whole, groups_of, open_at

from tiered_mem.prefixes import PrefixStore

NUM_KILLS = 100
# Every second store evicts all the time; the others never do, so all that was saved must be there.
CAPACITIES = (2 << 20, 1 << 30)
HASH_NBYTES = 32


def write_until_killed(path: Path, seed: int, progress: int) -> None:
    rng = random.Random(seed)
    with open_at(path, capacity=CAPACITIES[seed % 2]) as store:
        os.write(progress, b"!")
        while True:
            ids = [rng.randrange(6) for _ in range(8)]
            store.match(np.array(ids, np.int64))
            for record in store.save(groups_of(store, ids)):
                os.write(progress, record.hash)


def check(path: Path, seed: int, result: int, saved: set[bytes]) -> None:
    with PrefixStore.inspect(path) as store:  # which mends nothing
        assert not store.orphans and not store.broken and not store.index.headless()
        if seed % 2:
            assert saved <= store.index.records.keys()
    with open_at(path, capacity=CAPACITIES[seed % 2]) as store:
        check_whole(store)
        os.write(result, str(len(store.index.records)).encode())


def in_fork(function, path: Path, seed: int) -> tuple[int, int]:
    """Run `function` in a fresh process; return its process id and a pipe to read from."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function(path, seed, write)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    return pid, read


def kill_and_check(path: Path, seed: int, saved: set[bytes]) -> int:
    writer, progress = in_fork(write_until_killed, path, seed)
    assert os.read(progress, 1), "the writer failed on what the last one left"
    time.sleep(random.Random(seed).uniform(0, 0.03))
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    assert os.WIFSIGNALED(status), "the writer ended before it was killed"
    told = os.read(progress, 1 << 16)
    saved |= {told[i : i + HASH_NBYTES] for i in range(0, len(told), HASH_NBYTES)}
    os.close(progress)
    checker, result = in_fork(partial(check, saved=saved), path, seed)
    answer = os.read(result, 32)
    os.close(result)
    _, status = os.waitpid(checker, 0)
    assert status == 0, f"what the writer left doesn't read right (kill {seed})"
    return int(answer)


def main(path: Path) -> None:
    saved: tuple[set[bytes], set[bytes]] = (set(), set())
    counts = [
        kill_and_check(path / str(seed % 2), seed, saved[seed % 2]) for seed in range(NUM_KILLS)
    ]
    print(max(counts), len(saved[1]))


def test_kill_at_random_moments(tmp_path):
    # A program of its own: forking is safe there, where nothing has started threads.
    command = [sys.executable, __file__, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert all(int(count) > 0 for count in result.stdout.split()), "nothing was ever committed"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

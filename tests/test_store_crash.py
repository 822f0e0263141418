"""A writer killed at any moment leaves a store that reads as one of its committed states.

Run as a program, this file is the experiment: it forks a writer that puts, rewrites and deletes,
kills it at a random moment, and has another fresh process check what is there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store, allocate

NUM_KILLS = 20
KEYS = [BlockKey(Kind.EXPERT, 0, index) for index in range(12)]
SIZES = [100, 4096, 70_000, 300_000, (1 << 20) + 17]


def content(index: int, version: int) -> np.ndarray:
    rng = np.random.default_rng([index, version])
    return rng.integers(0, 64, SIZES[(index + version) % len(SIZES)], np.uint8)


def write_until_killed(path: Path, seed: int, progress: int) -> None:
    """Commit one state after another. The metadata of each says what its blocks must be."""
    rng = random.Random(seed)
    with Store.open(path, mode="w", capacity=1 << 30) as store:
        state: dict[str, int] = store.metadata.get("versions", {})
        version = store.metadata.get("version", 0)
        os.write(progress, b"!")
        while True:
            version += 1
            with store.transaction() as txn:
                for index in rng.sample(range(len(KEYS)), 4):
                    if str(index) in state and rng.random() < 0.3:
                        txn.delete(KEYS[index])
                        del state[str(index)]
                    else:
                        codec = rng.choice(["none", "zstd"])
                        txn.put(KEYS[index], content(index, version), codec=codec, itemsize=2)
                        state[str(index)] = version
                txn.set_metadata({"version": version, "versions": state})
            os.write(progress, b"!")


def check(path: Path, least_version: int) -> int:
    """Return the committed version, having compared every block with what that version holds."""
    with Store.open(path) as store, store.snapshot() as snapshot:
        versions = store.metadata.get("versions", {})
        assert {KEYS[int(i)].pack() for i in versions} == set(snapshot.keys().tolist())
        for index, version in versions.items():
            expected = content(int(index), version)
            out = allocate(snapshot.nbytes(KEYS[int(index)]))
            snapshot.read(KEYS[int(index)], out)
            assert np.array_equal(out, expected)
        committed = int(store.metadata.get("version", 0))
        assert committed >= least_version, "a committed transaction was lost"
        return committed


def in_fork(function, *arguments) -> int:
    """Run `function` in a fresh process; return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def kill_and_check(path: Path, seed: int, least_version: int) -> int:
    rng = random.Random(seed)
    progress_read, progress_write = os.pipe()
    writer = in_fork(write_until_killed, path, seed, progress_write)
    os.close(progress_write)
    # Odd runs are killed from the first commit on, even ones from the opening on.
    for _ in range(1 + seed % 2):
        assert os.read(progress_read, 1), "the writer failed on what the last one left"
    time.sleep(rng.uniform(0, 0.08))
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    assert os.WIFSIGNALED(status), "the writer ended before it was killed"
    os.close(progress_read)

    version_read, version_write = os.pipe()
    checker = in_fork(
        lambda: os.write(version_write, str(check(path, least_version)).encode()) and None
    )
    os.close(version_write)
    answer = os.read(version_read, 32)
    os.close(version_read)
    _, status = os.waitpid(checker, 0)
    assert status == 0, f"what the writer left doesn't read right (kill {seed})"
    return int(answer)


def main(path: Path) -> None:
    versions = [0]
    for seed in range(NUM_KILLS):
        versions.append(kill_and_check(path, seed, versions[-1]))
    print(json.dumps(versions[1:]))


def test_kill_at_random_moments(tmp_path):
    # A program of its own: forking is safe there, where nothing has started threads.
    command = [sys.executable, __file__, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    versions = json.loads(result.stdout)
    assert len(versions) == NUM_KILLS
    assert versions[-1] >= NUM_KILLS // 2  # the writers did get to commit


if __name__ == "__main__":
    main(Path(sys.argv[1]))

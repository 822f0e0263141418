"""The store beside raw O_DIRECT, LMDB by map, safetensors and buffered reads, honestly cold.

Every measurement reads random 4 MiB blocks by 1 or by 4 threads, from files of one size. Before it
the file leaves the page cache, and what stayed is recorded; peers take turns within each round. The
store's reads go by key: catalogue lookup (its pages as cold as the rest), O_DIRECT at the payload's
place, checksum. `--dir` keeps the files for later runs.

    python benchmarks/bench_store.py [--smoke] [--dir FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import cold
import lmdb
import numpy as np
import torch
from common import (
    OtherLoad,
    interleave,
    machine,
    median_of,
    paired_ratio,
    parser,
    print_table,
    write_results,
)
from safetensors import safe_open
from safetensors.torch import save_file

from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store, allocate

BLOCK = 4 << 20
READERS = (1, 4)
SLOTS = 16  # buffers of a reader, filled in turn as slots of an arena are
WRITE_BATCH = 16  # blocks a transaction: 64 MiB, as pack commits
MODEL = Path(__file__).parent / "models" / "tiny-moe" / "model.safetensors"

Read = Callable[[int, Any], None]


@dataclass(frozen=True)
class Size:
    num_blocks: int  # of each file
    num_reads: int  # of each measurement
    num_slow_reads: int  # of those through a map, which take 10 times as long
    rounds: int


SIZES = {"full": Size(512, 256, 32, 11), "smoke": Size(4, 2, 2, 2)}


def key(index: int) -> BlockKey:
    return BlockKey(Kind.EXPERT, index // 64, index % 64)


def blocks(num_blocks: int) -> Iterator[np.ndarray]:
    """Yield blocks that no cache or filesystem can shrink, made at the speed of a copy."""
    noise = np.random.default_rng(0).integers(0, 256, 2 * BLOCK, np.uint8)
    for index in range(num_blocks):
        start = index * 8191 % BLOCK
        yield noise[start : start + BLOCK]


# --- the files ---


def write_raw(path: Path, num_blocks: int) -> None:
    with direct_writer(path) as write:
        staged = allocate(BLOCK)
        for block in blocks(num_blocks):
            staged[:] = block
            write(staged)


def write_buffered(path: Path, num_blocks: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for block in blocks(num_blocks):
            file.write(block)
        os.fsync(file.fileno())


def write_store(path: Path, num_blocks: int) -> None:
    staged = allocate(BLOCK)
    with Store.open(path, mode="w") as store:
        source = enumerate(blocks(num_blocks))
        for _ in range(0, num_blocks, WRITE_BATCH):
            with store.transaction() as txn:
                for index, block in islice(source, WRITE_BATCH):
                    staged[:] = block
                    txn.put(key(index), staged)


def write_lmdb(path: Path, num_blocks: int) -> None:
    with lmdb.open(str(path), map_size=2 * num_blocks * BLOCK + (64 << 20)) as env:
        source = enumerate(blocks(num_blocks))
        for _ in range(0, num_blocks, WRITE_BATCH):
            with env.begin(write=True) as txn:
                for index, block in islice(source, WRITE_BATCH):
                    txn.put(index.to_bytes(8, "big"), block.data)


def write_safetensors(path: Path, num_blocks: int) -> None:
    tensors = {
        str(index): torch.from_numpy(block.copy()).view(torch.bfloat16)
        for index, block in enumerate(blocks(num_blocks))
    }
    save_file(tensors, path)
    os.sync()


@contextmanager
def direct_writer(path: Path) -> Iterator[Callable[[Any], None]]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    try:
        yield lambda block: require_all(os.writev(fd, [memoryview(block)]), len(block))
        os.fsync(fd)
    finally:
        os.close(fd)


def require_all(done: int, expected: int) -> None:
    if done != expected:
        raise OSError(f"{done} bytes moved of {expected}")


# --- the peers: each yields read(index, out) and names its file ---


@contextmanager
def raw_reader(path: Path, flags: int = os.O_DIRECT) -> Iterator[Read]:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        yield lambda index, out: require_all(os.preadv(fd, [out], index * BLOCK), BLOCK)
    finally:
        os.close(fd)


@contextmanager
def store_reader(path: Path) -> Iterator[Read]:
    with Store.open(path) as store, store.snapshot() as snapshot:
        yield lambda index, out: snapshot.read(key(index), out)


@contextmanager
def lmdb_reader(path: Path, readahead: bool) -> Iterator[Read]:
    with lmdb.open(str(path), readonly=True, readahead=readahead) as env:

        def read(index: int, out: np.ndarray) -> None:
            with env.begin(buffers=True) as txn:
                out[:] = np.frombuffer(txn.get(index.to_bytes(8, "big")), np.uint8)

        yield read


@contextmanager
def safetensors_reader(path: Path) -> Iterator[Read]:
    with safe_open(path, "pt") as file:
        yield lambda index, out: out.__setitem__(
            slice(None), file.get_tensor(str(index)).view(torch.uint8).numpy()
        )


@dataclass(frozen=True)
class Peer:
    open: Callable[[], Any]
    file: Path
    slow: bool = False


def prepare(folder: Path, num_blocks: int) -> dict[str, Peer]:
    """Write the files that aren't there yet and return the peers that read them."""
    raw, store = folder / "raw.bin", folder / "store"
    lmdb_folder, tensors = folder / "lmdb", folder / "blocks.safetensors"
    for path, write in (
        (raw, write_raw),
        (store, write_store),
        (lmdb_folder, write_lmdb),
        (tensors, write_safetensors),
    ):
        if not path.exists():
            write(path, num_blocks)
    mapped = lmdb_folder / "data.mdb"
    return {
        "raw O_DIRECT": Peer(lambda: raw_reader(raw), raw),
        "store": Peer(lambda: store_reader(store), store / "data.mdb"),
        "buffered pread": Peer(lambda: raw_reader(raw, 0), raw),
        "LMDB map copy": Peer(lambda: lmdb_reader(lmdb_folder, False), mapped, slow=True),
        "LMDB map copy, readahead": Peer(lambda: lmdb_reader(lmdb_folder, True), mapped, slow=True),
        "safetensors get_tensor": Peer(lambda: safetensors_reader(tensors), tensors, slow=True),
    }


# --- measuring ---


def slots(num_readers: int) -> list[list[np.ndarray]]:
    """Return SLOTS buffers for every reader, without page faults left to be measured.

    A single buffer would flatter a peer that doesn't look at what it read: under a virtual disk the
    host's core keeps it in its cache, which a reader that touches the bytes takes from it.
    """
    result = [[allocate(BLOCK) for _ in range(SLOTS)] for _ in range(num_readers)]
    for buffer in chain.from_iterable(result):
        buffer[:] = 0
    return result


def read_by_threads(read: Read, order: list[int], readers: list[list[np.ndarray]]) -> float:
    """Read the blocks of `order`, shared between one thread for each of `readers`. Return MB/s."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for index, out in zip(
                order[number :: len(readers)], cycle(readers[number]), strict=False
            ):
                read(index, out)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(readers))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    return len(order) * BLOCK / seconds / 1e6


class ColdReads:
    """Measures one peer after another and keeps the proof of how cold each file was."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.rng = np.random.default_rng(1)
        self.readers = slots(max(READERS))
        self.proof: dict[str, list[dict[str, float]]] = {}

    def measure(self, name: str, peer: Peer, num_readers: int) -> float:
        num_reads = self.size.num_slow_reads if peer.slow else self.size.num_reads
        order = self.rng.permutation(self.size.num_blocks)[:num_reads].tolist()
        with peer.open() as read:
            left = cold.drop([peer.file])
            fetched = cold.block_read_nbytes()
            rate = read_by_threads(read, order, self.readers[:num_readers])
            fetched = cold.block_read_nbytes() - fetched
            cached = cold.cached_nbytes(peer.file)
        self.proof.setdefault(name, []).append(
            {
                "cached_mb_before": left / 1e6,
                "cached_mb_after": cached / 1e6,
                "fetched_mb_per_read_mb": round(fetched / (len(order) * BLOCK), 3),
            }
        )
        return rate


def raw_passes(file: Path) -> dict[str, float]:
    """Read a file by O_DIRECT twice, from end to end. Return the MB/s of both passes.

    Under a virtual disk lies the host's cache, which no guest can drop. The first pass shows what
    it held; after the second all files are equally warm there, and their rates can be compared.
    """
    reader = slots(1)
    order = list(range(file.stat().st_size // BLOCK))
    with raw_reader(file) as read:
        first, second = (read_by_threads(read, order, reader) for _ in range(2))
    return {"first": round(first, 1), "second": round(second, 1)}


def _files(peers: dict[str, Peer]) -> list[Path]:
    return list(dict.fromkeys(peer.file for peer in peers.values()))


def bench_reads(folder: Path, size: Size) -> dict[str, Any]:
    peers = prepare(folder, size.num_blocks)
    passes = {str(file.relative_to(folder)): raw_passes(file) for file in _files(peers)}
    cold_reads = ColdReads(size)
    calls = {
        f"{name}, {n}": functools.partial(cold_reads.measure, f"{name}, {n}", peer, n)
        for n in READERS
        for name, peer in peers.items()
    }
    with OtherLoad() as others:
        measured = interleave(calls, size.rounds)
    return {
        "block_nbytes": BLOCK,
        "cpus_busy_by_others": others.cpus,
        "reads_per_measurement": {n: getattr(size, n) for n in ("num_reads", "num_slow_reads")},
        "file_mb": {name: peer.file.stat().st_size / 1e6 for name, peer in peers.items()},
        "raw_passes_mb_s": passes,
        "store_to_raw": {
            str(n): paired_ratio(measured[f"store, {n}"], measured[f"raw O_DIRECT, {n}"])
            for n in READERS
        },
        "median_mb_s": median_of(measured),
        "mb_s": {name: [round(rate, 1) for rate in rates] for name, rates in measured.items()},
        "cold": cold_reads.proof,
    }


def bench_writes(folder: Path, size: Size) -> dict[str, Any]:
    num_blocks = max(size.num_blocks // 4, WRITE_BATCH if size.num_blocks > 64 else 4)

    def timed(write: Callable[[Path, int], None]) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            start = time.perf_counter()
            write(Path(fresh) / "written", num_blocks)
            return num_blocks * BLOCK / (time.perf_counter() - start) / 1e6

    writers = {
        "raw O_DIRECT": write_raw,
        "buffered write": write_buffered,
        "store": write_store,
        "LMDB": write_lmdb,
    }
    calls = {name: functools.partial(timed, write) for name, write in writers.items()}
    measured = interleave(calls, max(size.rounds // 2, 2))
    return {
        "mb": num_blocks * BLOCK / 1e6,
        "synced": "every file by fsync; store and LMDB after every 64 MiB",
        "store_to_buffered": paired_ratio(measured["store"], measured["buffered write"]),
        "median_mb_s": median_of(measured),
        "mb_s": {name: [round(rate, 1) for rate in rates] for name, rates in measured.items()},
    }


def trained_weights() -> list[np.ndarray]:
    """Return the bfloat16 weights of the trained model beside this file as 1 MiB-chunked blocks."""
    with safe_open(MODEL, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    flat = [t.flatten().view(torch.uint8).numpy() for t in tensors if t.dtype == torch.bfloat16]
    joined = np.concatenate(flat)
    return [joined[i : i + BLOCK] for i in range(0, joined.size, BLOCK)]


def bench_codecs(folder: Path, size: Size) -> dict[str, Any]:
    """Ratio, writing speed and reading speed (of raw bytes) on trained bfloat16 weights."""
    weights = trained_weights()
    nbytes = sum(block.nbytes for block in weights)
    repeats = size.rounds
    ways = {
        "none": {"codec": "none"},
        "zstd": {"codec": "zstd", "itemsize": 1},
        "zstd, byte planes": {"codec": "zstd", "itemsize": 2},
    }
    readers = slots(max(READERS))
    with ExitStack() as stack:
        stores, snapshots = {}, {}
        for name in ways:
            path = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
            stores[name] = stack.enter_context(Store.open(Path(path) / "store", mode="w"))

        def write(name: str) -> float:
            start = time.perf_counter()
            with stores[name].transaction() as txn:
                for index, block in enumerate(weights):
                    txn.put(key(index), block, **ways[name])
            return nbytes / (time.perf_counter() - start) / 1e6

        written = interleave({n: functools.partial(write, n) for n in ways}, repeats)
        for name, store in stores.items():
            snapshots[name] = stack.enter_context(store.snapshot())
        whole = [i for i, block in enumerate(weights) if block.nbytes == BLOCK]
        calls = {
            f"{name}, {n}": functools.partial(
                read_by_threads,
                lambda index, out, name=name: snapshots[name].read(key(index), out),
                whole * 8,
                readers[:n],
            )
            for n in READERS
            for name in ways
        }
        read = interleave(calls, repeats)
        stored = {
            name: sum(e.stored_nbytes for e in snapshot.extents(snapshot.keys()))
            for name, snapshot in snapshots.items()
        }
    return {
        "weights": "benchmarks/models/tiny-moe, bfloat16",
        "raw_mb": nbytes / 1e6,
        "stored_to_raw": {name: round(count / nbytes, 4) for name, count in stored.items()},
        "median_write_mb_s": median_of(written),
        "median_read_mb_s": median_of(read),
        "write_mb_s": {k: [round(v, 1) for v in values] for k, values in written.items()},
        "read_mb_s": {k: [round(v, 1) for v in values] for k, values in read.items()},
    }


def report(results: dict[str, Any]) -> None:
    reads, writes, codecs = results["reads"], results["writes"], results["codecs"]
    rates = reads["median_mb_s"]
    names = [name.removesuffix(", 1") for name in rates if name.endswith(", 1")]
    print_table(
        [[name, *(rates[f"{name}, {n}"] for n in READERS)] for name in names],
        ["cold random 4 MiB reads, MB/s", *(f"{n} readers" for n in READERS)],
    )
    print("store to raw O_DIRECT:", reads["store_to_raw"])
    for name, rate in reads["raw_passes_mb_s"].items():
        warmth = "cold" if rate["first"] < 0.8 * rate["second"] else "warm"
        print(f"{name}: first pass {rate['first']} MB/s, second {rate['second']}: host-{warmth}")
    print()
    print_table(list(map(list, writes["median_mb_s"].items())), ["writes, synced", "MB/s"])
    print()
    print_table(
        [
            [
                name,
                ratio,
                codecs["median_write_mb_s"][name],
                *(codecs["median_read_mb_s"][f"{name}, {n}"] for n in READERS),
            ]
            for name, ratio in codecs["stored_to_raw"].items()
        ],
        ["codec on trained bf16", "stored/raw", "write", *(f"read by {n}" for n in READERS)],
    )


def main() -> None:
    args: argparse.Namespace = parser(__doc__.splitlines()[0], "store").parse_args()
    size = SIZES["smoke" if args.smoke else "full"]
    with ExitStack() as stack:
        folder = args.dir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        results = {
            "benchmark": "store",
            "smoke": args.smoke,
            "machine": machine(folder),
            "slots": f"{SLOTS} of 4 MiB a reader, in huge pages where the kernel grants them",
            "reads": bench_reads(folder, size),
            "writes": bench_writes(folder, size),
            "codecs": bench_codecs(folder, size),
        }
    report(results)
    write_results(args, results)


if __name__ == "__main__":
    sys.exit(main())

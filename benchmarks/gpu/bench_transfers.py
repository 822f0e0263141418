"""Copies between pinned host memory and the device, and from NVMe to it, beside what they bound.

1000 blocks (fewer where they would exceed 1 GiB) of 4 KiB to 16 MiB, in, out and both at once, all
scattered: by the runtime's own choice ("ours"), by plain async copies, batched copies, the gather
kernel, and torch's `copy_`, block by block; interleaved, round by round.

    python benchmarks/gpu/bench_transfers.py [--smoke] [--device cuda:0]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_common
import numpy as np
import torch
from bars import bar, common, print_bars
from cold import drop
from raw_read import best_rate

from tiered_mem import _core
from tiered_mem.device import kernels
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZES = tuple(4 * KIB * 4**n for n in range(7))
DIRECTIONS = ("in", "out", "both")
PEERS = {"plain": "engine", "batched": "batch", "kernel": "kernel"}
LARGEST = 256 * MIB


class Way:
    """One way of copying, with host memory of its own, page-locked for it."""

    def __init__(self, device: torch.device, method: str, nbytes: int, on_device: torch.Tensor):
        self.core: Any = _core.host_device()
        if device.type == "cuda":
            self.core = _core.CudaDevice(device.index or 0, method)
            kernels.load_kernels(self.core)
            if method == "auto":
                self.core.set_calibration(self.core.calibrate())
        self.host = torch.ones(2 * nbytes + 4096, dtype=torch.uint8)
        self.begin = -(-self.host.data_ptr() // 4096) * 4096
        self.pin = self.core.pin(self.begin, 2 * nbytes)
        self.on_device = on_device.data_ptr()
        self.half = nbytes

    def copies(self, direction: str, nbytes: int, places: np.ndarray) -> np.ndarray:
        """Return [count, 3] copies. Host and device have a half for each direction."""
        half = self.half if direction == "out" else 0
        host = self.begin + half + np.arange(len(places), dtype=np.uint64) * np.uint64(nbytes)
        device = self.on_device + half + places.astype(np.uint64) * np.uint64(nbytes)
        target, source = (device, host) if direction == "in" else (host, device)
        return np.stack([target, source, np.full(len(places), nbytes, np.uint64)], axis=1)

    def work(self, direction: str, nbytes: int, places: np.ndarray) -> Callable[[], None]:
        ways = ("in", "out") if direction == "both" else (direction,)
        batches = [(way, self.copies(way, nbytes, places)) for way in ways]

        def copy() -> None:
            for mark in [self.core.copy(way, batch) for way, batch in batches]:
                self.core.wait(mark)

        return copy


class TorchWay:
    """torch's own `copy_`, a side stream for each direction."""

    def __init__(self, device: torch.device, nbytes: int, on_device: torch.Tensor):
        cuda = device.type == "cuda"
        self.host = torch.ones(2 * nbytes, dtype=torch.uint8, pin_memory=cuda)
        self.on_device, self.half = on_device, nbytes
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if cuda else [None, None]

    def work(self, direction: str, nbytes: int, places: np.ndarray) -> Callable[[], None]:
        def pairs(way: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
            half = self.half if way == "out" else 0
            host = self.host[half:].split(nbytes)
            device = self.on_device[half:].split(nbytes)
            both = [(device[place], host[n]) for n, place in enumerate(places.tolist())]
            return both if way == "in" else [(to, of) for of, to in both]

        ways = ("in", "out") if direction == "both" else (direction,)
        work = [(stream, pairs(way)) for way, stream in zip(ways, self.streams, strict=False)]

        def copy() -> None:
            for stream, blocks in work:
                with torch.cuda.stream(stream):
                    for target, source in blocks:
                        target.copy_(source, non_blocking=True)

        return copy


def measure(options: Any) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    device = options.device
    half = MIB if options.smoke else GIB
    on_device = torch.zeros(2 * half, dtype=torch.uint8, device=device)
    methods = {"ours": "auto"} | (PEERS if device.type == "cuda" else {})
    ways: dict[str, Any] = {
        name: Way(device, method, half, on_device) for name, method in methods.items()
    }
    ways["torch"] = TorchWay(device, half, on_device)
    rows = []
    for nbytes in SIZES[:4] if options.smoke else SIZES:
        places = np.random.default_rng(0).permutation(min(1000, half // nbytes))
        for direction in DIRECTIONS:
            works = {name: way.work(direction, nbytes, places) for name, way in ways.items()}
            moved = nbytes * len(places) * (2 if direction == "both" else 1)
            for work in works.values():
                gpu_common.seconds_of(device, work)
            rates = common.interleave(
                {
                    name: lambda work=work, moved=moved: moved / gpu_common.seconds_of(device, work)
                    for name, work in works.items()
                },
                options.rounds,
            )
            rows.append(
                {
                    "nbytes": nbytes,
                    "num_blocks": len(places),
                    "direction": direction,
                    "bytes_per_second": rates,
                    "method": chosen(ways["ours"].core, direction, nbytes, len(places)),
                }
            )
    # The reference is as large as a copy needs to be, by the plainest way there is.
    plain = ways.get("plain", ways["ours"])
    large = min(LARGEST, half)
    largest = {}
    for direction in DIRECTIONS:
        work = plain.work(direction, large, np.arange(half // large))
        moved = half // large * large * (2 if direction == "both" else 1)
        work()
        largest[direction] = [
            moved / gpu_common.seconds_of(device, work) for _ in range(options.rounds)
        ]
    return rows, largest


def chosen(core: Any, direction: str, nbytes: int, num_blocks: int) -> str | None:
    """Return what "ours" copies by: where both directions work, that of copies in."""
    if not hasattr(core, "copy_method"):
        return None
    return core.copy_method("out" if direction == "out" else "in", nbytes, num_blocks)


def from_nvme(options: Any, rates_in: list[float]) -> dict[str, Any]:
    """Measure reads of a store's blocks into the device, beside raw reads and the link."""
    nbytes, count = (256 * KIB, 8) if options.smoke else (4 * MIB, 512)
    path = Path(options.dir) / f"transfers-{count}x{nbytes}.store"
    keys = [BlockKey(Kind.EXPERT, 0, n) for n in range(count)]
    random = np.random.default_rng(0)
    if not path.exists():
        with Store.open(path, mode="w") as store, store.transaction() as transaction:
            for key in keys:
                transaction.put(key, random.integers(0, 256, nbytes, dtype=np.uint8))
    device = options.device
    file = path / "data.mdb"
    ours, raw = [], []
    for _ in range(options.rounds):
        drop([file])
        raw.append(best_rate(file, total_nbytes=nbytes * count))
        drop([file])
        ours.append(nbytes * count / read_all(path, keys, nbytes, device))
    link = statistics.median(rates_in)
    slower = [min(rate, link) for rate in raw]
    return {
        "nbytes": nbytes,
        "num_blocks": count,
        "bytes_per_second": {"ours": ours, "raw reads": raw, "link": rates_in},
        "to_slower_link": common.paired_ratio(ours, slower),
    }


def read_all(path: Path, keys: list[BlockKey], nbytes: int, device: torch.device) -> float:
    """Return the seconds in which all blocks come from the store into HBM."""
    packed = np.array([key.pack() for key in keys], dtype=np.uint64)
    num_keys = len(packed)
    room = (nbytes + 4096) * len(keys) + 64 * MIB
    core = _core.CudaDevice(device.index or 0) if device.type == "cuda" else None
    with Store.open(path) as store, store.snapshot() as snapshot:
        tiers = _core.Tiers(hbm=room, dram=0, num_io_threads=8, device=core)
        try:
            if core is not None:
                segment = torch.empty(room + 4096, dtype=torch.uint8, device=device)
                tiers.add_segment(-(-segment.data_ptr() // 4096) * 4096, room, segment)
            tiers.add_blocks(packed, snapshot.extents(keys))

            def read() -> None:
                event = tiers.acquire(packed)
                num_done = 0
                while num_done < num_keys:
                    ready, failed = event.wait_any()
                    if failed:
                        raise OSError(f"blocks could not be read: {failed}")
                    num_done += len(ready)
                event.release()

            return gpu_common.seconds_of(device, read)
        finally:
            tiers.close()


def summarise(rows: list[dict[str, Any]], largest: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a line for each size and direction: medians in GB/s, and ratios within rounds."""
    lines = []
    for row in rows:
        rates = row["bytes_per_second"]
        medians = {name: statistics.median(values) for name, values in rates.items()}
        peers = {name: rate for name, rate in medians.items() if name != "ours"}
        best = max(peers, key=peers.__getitem__)
        lines.append(
            {
                "nbytes": row["nbytes"],
                "direction": row["direction"],
                "method": row["method"],
                "gb_per_second": {name: round(rate / 1e9, 3) for name, rate in medians.items()},
                "best_peer": best,
                "to_best_peer": common.paired_ratio(rates["ours"], rates[best]),
                "to_largest": round(
                    medians["ours"] / statistics.median(largest[row["direction"]]), 4
                ),
            }
        )
    return lines


def bars_of(lines: list[dict[str, Any]], nvme: dict[str, Any]) -> list[dict[str, Any]]:
    worst = min(line["to_best_peer"] for line in lines)
    large = [line["to_largest"] for line in lines if line["nbytes"] >= MIB]
    large = large or [line["to_largest"] for line in lines[-3:]]  # a smoke run has none so large
    return [
        bar("copies, to the best peer at the worst size", worst, 0.95),
        bar("copies from 1 MiB up, to the largest", min(large), 0.97),
        bar("NVMe to HBM, to the slower link", nvme["to_slower_link"], 0.95),
    ]


def main() -> None:
    parser = gpu_common.parser(__doc__.splitlines()[0], "transfers")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    options = gpu_common.parse(parser)
    options.rounds = options.rounds or (1 if options.smoke else 5)
    rows, largest = measure(options)
    nvme = from_nvme(options, largest["in"])
    lines = summarise(rows, largest)
    results = gpu_common.describe(options) | {
        "settings": {"rounds": options.rounds, "largest_nbytes": LARGEST},
        "summary": {"copies": lines, "nvme": nvme["to_slower_link"]},
        "bars": bars_of(lines, nvme),
        "rounds": {"copies": rows, "largest": largest, "nvme": nvme},
    }
    names = list(lines[0]["gb_per_second"])
    common.print_table(
        [
            [
                *(f"{line['nbytes'] // KIB} KiB {line['direction']}", line["method"] or "host"),
                *line["gb_per_second"].values(),
                *(line["to_best_peer"], line["to_largest"]),
            ]
            for line in lines
        ],
        ["blocks", "by", *(f"{name} GB/s" for name in names), "to best", "to largest"],
    )
    gpu_common.write(options, results)
    print_bars(results)


if __name__ == "__main__":
    main()

"""What the benchmarks of the GPU share: arguments, the card, timing, links, memory and bars.

It stands upon benchmarks/common.py, which it passes on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from bars import common
from decode_peers import rss_anon
from raw_read import best_rate

_NO_CLAIM = "a smoke run in tiny sizes: it shows that the benchmark runs, and holds no claim"
_LARGE_COPY_NBYTES = 256 << 20
_NUM_COPIES = 8


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all benchmarks of the GPU take."""
    result = common.parser(description, f"gpu_{name}")
    result.add_argument("--device", help="default: cuda, or cpu with --smoke")
    return result


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, choose device and folder. Exits with a message if there is no such device."""
    options = parser.parse_args()
    options.device = torch.device(options.device or ("cpu" if options.smoke else "cuda"))
    if options.device.type == "cpu" and not options.smoke:
        parser.error("on the CPU there is a smoke run alone: give --smoke, or another --device")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here: give --smoke to see the benchmark run")
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    options.dir = options.dir or roomiest_folder() / "tiered-mem-benchmarks"
    options.dir.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    return options


def roomiest_folder() -> Path:
    """Return the folder for tens of GB: of the usual ones on a disk, where most is free.

    A tmpfs holds no store: it has no O_DIRECT, and is the memory that is to be measured.
    """
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    rooms = {}
    for folder in (Path(tempfile.gettempdir()), Path("/var/tmp"), Path.home(), Path.cwd()):
        with suppress(OSError):
            mount = next(str(p) for p in (folder, *folder.parents) if str(p) in mounts)
            if mounts[mount] != "tmpfs":
                rooms[folder] = psutil.disk_usage(str(folder)).free
    return max(rooms, key=rooms.__getitem__, default=Path(tempfile.gettempdir()))


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine and the device, for a results file."""
    where: dict[str, Any] = {"machine": common.machine(options.dir)}
    device: dict[str, Any] = {"type": options.device.type, "name": "the CPU, in a GPU's place"}
    if options.device.type == "cuda":
        properties = torch.cuda.get_device_properties(options.device)
        device |= {
            "name": properties.name,
            "memory_nbytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(options.device)),
            "cuda": torch.version.cuda,
        }
    return where | {"device": device, "claims": _NO_CLAIM if options.smoke else "measured"}


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write results; of a smoke run no bar is met or missed."""
    if options.smoke:
        results["bars"] = [line | {"met": None} for line in results.get("bars", [])]
    common.write_results(options, results)


# --- time ---


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(device: torch.device, work: Callable[[], Any]) -> float:
    """Return how long `work` takes, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


# --- links ---


class Links:
    """Rates of the links, measured beside what they bound: bytes per second, every sample kept.

    `dram` is host memory to the device: torch's own copies from page-locked memory, in the size of
    a block and in the largest that makes a difference; `nvme` is raw O_DIRECT reads of the store.
    """

    def __init__(self, device: torch.device, block_nbytes: int, file: Path, *, smoke: bool) -> None:
        self._device, self._file, self._smoke = device, file, smoke
        sizes = (block_nbytes,) if smoke else (block_nbytes, _LARGE_COPY_NBYTES)
        self.samples: dict[str, list[float]] = {f"dram, {n} bytes a copy": [] for n in sizes}
        self._sizes = dict(zip(self.samples, sizes, strict=True))
        self.samples["nvme"] = []

    def measure(self) -> None:
        for name, nbytes in self._sizes.items():
            self.samples[name].append(self._copy_rate(nbytes))
        total = 4 << 20 if self._smoke else 1 << 30
        self.samples["nvme"].append(best_rate(self._file, total_nbytes=total))

    @property
    def dram(self) -> float:
        return max(statistics.median(self.samples[name]) for name in self._sizes)

    @property
    def nvme(self) -> float:
        return statistics.median(self.samples["nvme"])

    def as_dict(self) -> dict[str, Any]:
        return {"dram": self.dram, "nvme": self.nvme, "samples": self.samples}

    def _copy_rate(self, nbytes: int) -> float:
        pinned = self._device.type != "cpu"
        sources = torch.ones(_NUM_COPIES, nbytes, dtype=torch.uint8, pin_memory=pinned)
        targets = torch.empty(_NUM_COPIES, nbytes, dtype=torch.uint8, device=self._device)

        def copy() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)

        copy()
        return _NUM_COPIES * nbytes / seconds_of(self._device, copy)


def bound_seconds(
    stats: dict[str, Any], block_nbytes: int, compute_seconds: float, links: Links
) -> tuple[float, dict[str, float]]:
    """Return the least seconds for what `stats` say was missed, and the bytes of each link.

    What a prefetch brought in time was missed as well, what it brought in vain was not. The links
    work at the same time, and beside the computing: max(compute, bytes / link) of each.
    """
    needed = stats["num_dram_hits"] + stats["num_nvme_reads"] + stats["num_prefetched_used"]
    arrived = {name: stats["nbytes_moved"].get(f"{name}_to_hbm", 0) for name in ("dram", "nvme")}
    share = needed * block_nbytes / max(1, sum(arrived.values()))
    nbytes = {name: amount * share for name, amount in arrived.items()}
    least = max(compute_seconds, nbytes["dram"] / links.dram, nbytes["nvme"] / links.nvme)
    return least, nbytes


# --- memory ---


class DeviceMemory:
    """Peaks of the device's memory from its making on, in bytes.

    `allocated` is torch's own account; `taken` is what all processes hold more than at the start,
    torch's cache included. On the CPU both are this process's anonymous memory, when asked.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.reset_peak()
        self._taken_before = self._taken()
        self.held_before = self.held()

    def reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def held(self) -> int:
        """Return the bytes of live tensors now."""
        cuda = self._device.type == "cuda"
        return torch.cuda.memory_allocated(self._device) if cuda else rss_anon()

    def peaks(self) -> dict[str, int]:
        cuda = self._device.type == "cuda"
        allocated = torch.cuda.max_memory_allocated(self._device) if cuda else rss_anon()
        return {"allocated": allocated, "taken": self._taken() - self._taken_before}

    def _taken(self) -> int:
        if self._device.type != "cuda":
            return rss_anon()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

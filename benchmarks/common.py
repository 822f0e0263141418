"""What every benchmark shares: arguments, the machine it ran on, rounds, and the results file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from cold import read_ahead_kb

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("lmdb", "numpy", "safetensors", "torch", "transformers", "zstandard")


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all benchmarks take.

    `--json` defaults to results/NAME.json, and to nothing with `--smoke`.
    """
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument("--smoke", action="store_true", help="seconds, tiny sizes, no claims")
    result.add_argument("--json", type=Path, help=f"results file (default: results/{name}.json)")
    result.add_argument(
        "--dir", type=Path, help="folder on the disk to measure (default: temporary)"
    )
    result.set_defaults(benchmark=name)
    return result


def machine(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe this machine and the filesystem under `folder`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "filesystem": _filesystem(Path(folder)),
        "read_ahead_kb": read_ahead_kb(folder),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


class OtherLoad:
    """Context manager: how many CPUs other processes kept busy meanwhile, in `cpus`."""

    cpus = float("nan")

    def __enter__(self) -> OtherLoad:
        self._before = self._sample()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, other = (
            after - before for after, before in zip(self._sample(), self._before, strict=True)
        )
        self.cpus = round(max(other, 0.0) / seconds, 3)
        if self.cpus > 0.2:
            print(f"warning: other processes kept {self.cpus} CPUs busy", file=sys.stderr)

    @staticmethod
    def _sample() -> tuple[float, float]:
        machine_times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = ("idle", "iowait", "steal")
        busy = sum(machine_times) - sum(getattr(machine_times, name, 0.0) for name in idle)
        return time.monotonic(), busy - own.user - own.system


def interleave(peers: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Call every peer once a round, so that drift of the machine meets all alike.

    The order turns by one from round to round. Returns the measurements by peer, in round order.
    """
    names = list(peers)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(num_rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            measured[name].append(peers[name]())
    return measured


def median_of(measured: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 3) for name, values in measured.items()}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within each round: drift cancels out."""
    pairs = zip(numerator, denominator, strict=True)
    return round(statistics.median(above / below for above, below in pairs), 4)


def write_results(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write `results` to the file that `args` name, and say where; a smoke run may have none."""
    path = args.json or (None if args.smoke else RESULTS / f"{args.benchmark}.json")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)


def print_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> None:
    """Print aligned columns; numbers to the right."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    for line in cells:
        first = line[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([first, *rest]))


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Hardware", "CPU implementer")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _filesystem(folder: Path) -> str:
    target = folder.resolve()
    mounts = [
        part for part in psutil.disk_partitions(all=True) if target.is_relative_to(part.mountpoint)
    ]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None

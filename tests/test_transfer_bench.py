"""The benchmarks of transfers and kernels run, by their --smoke, and claim nothing by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"


def run_smoke(name: str, folder: Path) -> dict[str, Any]:
    out = folder / "results.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke", "--device", "cpu"]
    command += ["--json", str(out), "--dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(out.read_text())
    assert "no claim" in results["claims"] and results["device"]["type"] == "cpu"
    assert all(bar["met"] is None for bar in results["bars"])
    return results


def test_transfers(tmp_path: Path) -> None:
    results = run_smoke("bench_transfers", tmp_path)
    lines = results["summary"]["copies"]
    assert {(line["nbytes"], line["direction"]) for line in lines} == {
        (4096 * 4**n, direction) for n in range(4) for direction in ("in", "out", "both")
    }
    for line in lines:
        assert set(line["gb_per_second"]) == {"ours", "torch"}
        assert line["to_best_peer"] > 0 and line["to_largest"] > 0
    assert len(results["bars"]) == 3
    nvme = results["rounds"]["nvme"]["bytes_per_second"]
    assert all(rate > 0 for rates in nvme.values() for rate in rates)


def test_kernels(tmp_path: Path) -> None:
    summary = run_smoke("bench_kernels", tmp_path)["summary"]
    assert {line["table"] for line in summary["gathers"]} == {"host", "device"}
    assert all(line["gb_per_second"]["torch"] > 0 for line in summary["gathers"])
    assert all(line["microseconds"]["torch"] > 0 for line in summary["remaps"])

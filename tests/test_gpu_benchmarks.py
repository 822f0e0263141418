"""The benchmarks of the GPU run, in tiny sizes on the CPU, and claim nothing there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"
SCRIPTS = sorted(FOLDER.glob("bench_gpu_*.py"))

# One process for all: most of a tiny run is importing torch and transformers.
_RUN_ALL = """
import runpy, sys
folder, out, *scripts = sys.argv[1:]
sys.path.insert(0, folder)
for name in scripts:
    sys.argv = [name, "--smoke", "--json", f"{out}/{name}.json", "--dir", f"{out}/files"]
    runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-c", _RUN_ALL, str(FOLDER), str(out)]
    done = subprocess.run(
        [*command, *(script.stem for script in SCRIPTS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_smoke_claims_nothing(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert {"cpu", "cores", "kernel", "packages", "commit"} <= set(found["machine"])
    assert found["device"]["type"] == "cpu"
    assert "no claim" in found["claims"]
    assert found["bars"] and all(line["met"] is None for line in found["bars"])


def test_decode(results: dict[str, Any]) -> None:
    found = results["bench_gpu_decode"]
    summary = found["summary"]
    assert not found["failures"]
    assert {"unmodified, all resident", "ours, all resident", "accelerate.cpu_offload"} <= set(
        summary
    )
    assert all(row["max_abs_dlogit"] == 0 for row in summary.values())
    assert all(len(run["rounds"]) >= 5 for run in found["runs"])
    hits = [summary[f"HBM {share} %, DRAM, none"]["hit_rate"] for share in (10, 25, 50)]
    assert hits == sorted(hits) and summary["ours, all resident"]["hit_rate"] == 1
    for run in found["runs"]:
        counts = [measured["stats"] for measured in run["rounds"] if "stats" in measured]
        prefetched = sum(stats["num_prefetched"] for stats in counts)
        assert (prefetched > 0) == run.get("prefetch", False), run["name"]
        if counts:
            assert len(run["layer_seconds"]) == found["model"]["num_layers"]
    nvme = [run for run in found["runs"] if run.get("dram") == 50]
    assert len(nvme) == 2
    assert found["links"]["dram"] > 0 and found["links"]["nvme"] > 0


def test_prefill(results: dict[str, Any]) -> None:
    found = results["bench_gpu_prefill"]
    assert found["summary"]["max_abs_dlogit"] == 0
    assert found["summary"]["missed_gb"] > 0
    assert len(found["runs"]["ours"]["seconds"]) == 5


def test_memory(results: dict[str, Any]) -> None:
    found = results["bench_gpu_memory"]
    parts = found["summary"]["parts_nbytes"]
    assert parts["budget"] == found["model"]["experts_nbytes"] // 4
    assert parts["non_expert_weights"] == found["model"]["non_expert_nbytes"]


def test_small(results: dict[str, Any]) -> None:
    found = results["bench_gpu_small"]
    assert found["summary"]["same_share"] == 1
    assert found["summary"]["hit_rate"] < 1
    assert found["summary"]["model_to_card"] >= 4


@pytest.mark.usefixtures("on_path")
def test_routes_are_the_traces_own_first() -> None:
    from big_model import SMOKE  # type: ignore[import-not-found]
    from forced_routes import load_trace, routes_of  # type: ignore[import-not-found]

    trace = load_trace(None, smoke=True)
    routes = routes_of(trace, SMOKE)
    assert routes.shape == (40, SMOKE.num_layers, SMOKE.top_k)
    assert all(len(set(ids)) == SMOKE.top_k for ids in routes.reshape(-1, SMOKE.top_k).tolist())
    first_event = (trace.event(0) & np.uint64(0xFFFFFFFF)).tolist()
    assert routes[0, 0, : len(first_event)].tolist() == first_event


@pytest.mark.usefixtures("on_path")
def test_bound_is_the_slowest_of_computing_and_links() -> None:
    from gpu_common import bound_seconds  # type: ignore[import-not-found]

    class Rates:
        dram, nvme = 100.0, 10.0

    stats = {
        "num_dram_hits": 6,
        "num_nvme_reads": 2,
        "num_prefetched_used": 2,
        # 20 blocks came, of which 10 were of use
        "nbytes_moved": {"dram_to_hbm": 1500, "nvme_to_hbm": 500, "hbm_to_dram": 7},
    }
    assert bound_seconds(stats, 100, 1.0, Rates()) == (25.0, {"dram": 750.0, "nvme": 250.0})
    assert bound_seconds(stats, 100, 30.0, Rates())[0] == 30.0


def run_script(tmp_path: Path, *arguments: str, **environment: str) -> Any:
    paths = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path), "PYTHON": sys.executable}
    return subprocess.run(
        [FOLDER / "run.sh", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | paths | environment,
    )


def test_script_runs_a_step_and_prints_a_table(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--dry-run", "--only", "model")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[:2] for line in done.stdout.splitlines() if " ok " in line]
    assert steps == [["build", "ok"], ["model", "ok"]]
    assert json.loads((tmp_path / "out" / "model.json").read_text())["model"]["num_layers"] == 4


def test_script_says_what_failed(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--dry-run", "--only", "model", PYTHON="false")
    assert done.returncode == 1
    assert "build      FAILED (1)" in done.stdout


@pytest.mark.parametrize("arguments", [["--part", "4"], ["--only", "nothing"], ["--fast"]])
def test_script_refuses_what_it_does_not_know(tmp_path: Path, arguments: list[str]) -> None:
    done = run_script(tmp_path, *arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_script_runs_every_benchmark() -> None:
    listed = (FOLDER / "run.sh").read_text()
    for script in FOLDER.glob("bench_*.py"):
        assert f"run_bench {script.stem}" in listed

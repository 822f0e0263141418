"""Every benchmark runs, by its --smoke, and writes results of the shape that is promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiered_mem.policy import list_policies

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("bench_*.py"))


def run_smoke(script: Path, tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / "results.json"
    command = [sys.executable, str(script), "--smoke", "--json", str(out)]
    command += ["--dir", str(tmp_path / "files")]
    (tmp_path / "files").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def test_all_are_found() -> None:
    names = {script.stem for script in SCRIPTS}
    assert names == set(CHECKS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_smoke(script: Path, tmp_path: Path) -> None:
    results = run_smoke(script, tmp_path)
    machine = results["machine"]
    assert {"cpu", "cores", "kernel", "filesystem", "packages", "commit"} <= set(machine)
    CHECKS[script.stem](results)


def check_decode(results: dict[str, Any]) -> None:
    peers = results["summary"]
    assert {"all-in-ram", "accelerate.disk_offload", "tiered_mem next-gate lru"} <= set(peers)
    assert set(results["rounds"]) == set(peers)
    for name, figures in peers.items():
        # Same tokens in, same logits out: a peer that computes something else proves nothing.
        assert figures["max_abs_dlogit"] == 0, name
        assert figures["equal_argmax_share"] == 1, name
        assert figures["tokens_per_second"] > 0
        assert figures["times_faster_than"][name] == 1
    ours = peers["tiered_mem next-gate lru"]
    assert 0 < ours["hit_rate"] < 1
    assert ours["block_read_mb_per_token"] > 0
    run = results["rounds"]["tiered_mem next-gate lru"][0]
    assert len(run["seconds"]) == results["settings"]["num_tokens"]
    assert all(rate > 0 for rate in run["raw_bytes_per_second"])
    read = results["rounds"]["accelerate.disk_offload"][0]["block_read_nbytes"]
    assert min(read) > 0, "the page cache had been dropped before every token"


def check_fidelity(results: dict[str, Any]) -> None:
    for line in results["summary"]:
        assert line["same_decisions"]
        assert line["stall_seconds"] > 0 and line["simulated_stall_seconds"] > 0
    assert all(run["num_misses"] > 0 for run in results["rounds"])


def check_guesses(results: dict[str, Any]) -> None:
    points = results["points"]
    assert len(points) == 2 * 3 * 5, "policies, budgets and links"
    highest = 0.0
    for point in points:
        runs = {run["recall"]: run for run in point["runs"]}
        assert set(runs) == {None, 0, 20, 40, 60, 80, 100}
        assert runs[None]["num_prefetched"] == 0 and runs[None]["ratio"] == 1
        assert runs[100]["num_prefetched_used"] > 0
        highest = max(highest, *(run["ratio"] for run in runs.values()))
    assert results["summary"]["worst_ratio"]["is"] == highest


def check_context(results: dict[str, Any]) -> None:
    summary = results["summary"]
    assert summary["same_tokens"]
    assert summary["largest_logit_difference"] < 1e-4
    cold_budgets = {"50%", "25%", "5%"}
    assert set(results["rounds"]) == cold_budgets | {"dynamic", "preallocated", "whole"}
    for name, budget in results["settings"]["budgets"].items():
        assert 0 < summary["peak_hbm_nbytes"][name] <= budget
    assert set(summary["cold"]) == cold_budgets
    for found in summary["cold"].values():
        assert found["mb_read_per_token"] > 0
        assert found["to_strict_limit"] >= found["to_limit"]


def check_mooncake(results: dict[str, Any]) -> None:
    assert results["summary"]["all_equal"]
    assert results["summary"]["num_wrong"] == 0
    runs = results["rounds"]
    for run in runs:
        assert 0 < run["num_prefix_hits"] < run["num_verified"] < run["num_accesses"]
        assert run["num_evictions"] > 0 and run["num_nvme_reads"] > 0
        assert (run["num_dram_hits"] > 0) == (run["dram"] > 0)
    assert {run["eviction"] for run in runs if run["equal"]} >= {"lru", "lfu", "arc", "s3-fifo"}


def check_overhead(results: dict[str, Any]) -> None:
    summary = results["summary"]
    assert {"acquire", "wait_any", "release", "whole"} == set(summary["event_us"])
    assert all(value > 0 for value in summary["event_us"].values())
    assert set(summary["tiered_mem_to"]) == {"tiered_mem", "linear", "grouped_mm", "eager"}
    assert summary["tiered_mem_to"]["tiered_mem"] == 1


def check_policies(results: dict[str, Any]) -> None:
    standings = results["summary"]["standings"]["all routes"]
    known = {policy.name for policy in list_policies()} - {"belady", "per-layer(X)"}
    assert known | {"per-layer(lru)", "per-layer(lfu)"} == set(standings)
    assert standings["lru"]["worst_margin_over_lru"]["is"] == 0
    assert standings["lru"]["worst_stall_to_lru"]["is"] == 1
    bounds = {bound["hbm"]: bound for bound in results["bounds"]}
    assert set(bounds) == {"10%", "25%", "50%"}
    for run in results["runs"]:
        bound = bounds[run["hbm"]]
        assert run["num_hits"] + run["num_misses"] == bound["num_accesses"]
        assert run["stall_ms_per_token"] >= bound["stall_lower_ms_per_token"]
        if run["prefetch"] == "none":
            assert run["num_misses"] >= bound["num_misses_forced"], run["eviction"]


def check_prefetch(results: dict[str, Any]) -> None:
    summary = results["summary"]
    shipped = {"none", "none again", "next-gate", "previous-token"}
    assert set(summary) == shipped | {"oracle 0%", "oracle 100%"}
    for name, figures in summary.items():
        assert figures["ratio_to_none"] > 0 and figures["tokens_per_second"] > 0, name
        assert 0 <= figures["prefetch_precision"] <= 1, name
    assert summary["none"]["prefetched_per_token"] == 0
    assert summary["oracle 0%"]["prefetch_recall"] < summary["oracle 100%"]["prefetch_recall"]


def check_store(results: dict[str, Any]) -> None:
    reads = results["reads"]
    assert set(reads["store_to_raw"]) == {"1", "4"}
    assert all(rate > 0 for rates in reads["mb_s"].values() for rate in rates)
    assert results["codecs"]["stored_to_raw"]["zstd, byte planes"] < 0.8


def check_agreement(results: dict[str, Any]) -> None:
    for trace in results["traces"].values():
        for policy, misses in trace["misses"].items():
            assert len(misses["ours"]) == len(trace["num_slots"]) == len(misses["libcachesim"])
            assert all(0 < count <= trace["num_requests"] for count in misses["ours"]), policy
    for policy, row in results["summary"].items():
        counted = row["num_uncounted_by_libcachesim"] == 0  # if it is installed
        assert row["equal"] or not row["must_be_equal"] or not counted, policy


def check_replay(results: dict[str, Any]) -> None:
    summary = results["summary"]
    for rates in summary["replay"].values():
        assert {"lru", "sieve", "arc", "s3-fifo", "w-tinylfu", "belady"} == set(rates)
        assert all(row["ours"] > 0 for row in rates.values())
    assert summary["plug_in"]["python-lru"]["ours"] > 0
    assert all(row["ours"] >= 0 for row in summary["nbytes_per_slot"].values())
    assert all(len(row) == 3 for row in summary["nanoseconds_per_request"].values())


def check_resume(results: dict[str, Any]) -> None:
    summary = results["summary"]
    assert summary["same_token"] and summary["same_decoded"]
    assert summary["num_restored"] == 384  # of 400 tokens
    assert summary["compute_seconds"] > 0 and summary["resume_seconds"] > 0
    (resumed,) = results["rounds"]["resume"]
    assert resumed["cached_nbytes"] == 0, "the file was dropped from the page cache"
    settings = results["settings"]
    assert resumed["load_nbytes"] == settings["num_groups"] * settings["group_nbytes"]
    assert results["rounds"]["save"][0]["nbytes"] == resumed["load_nbytes"]
    assert "summary" in results["lmcache"] or results["lmcache"]["why_not"]


def check_sparse(results: dict[str, Any]) -> None:
    sizes = results["summary"]["block_tokens"]
    assert len(sizes) > 1
    for found in sizes.values():
        assert found["same_selection"] > 0
        assert found["largest_logit_difference"] < 1e-4
        assert 0 < found["read_to_whole_context"] <= 1
        assert found["blocks_per_token"] > 0


def check_quest(results: dict[str, Any]) -> None:
    runs = results["summary"]
    assert {run["attention"] for run in runs} == {"full attention", "all blocks", "quest"}
    reads = {run["tokens_read"]: run["mb_read_per_token"] for run in runs if run["block_tokens"]}
    assert min(reads.values()) < reads["all"]
    for run in runs:
        if reads.get(run["tokens_read"]) == reads["all"]:
            assert run["largest_logit_difference"] < 1e-4


CHECKS = {
    "bench_agreement": check_agreement,
    "bench_decode": check_decode,
    "bench_fidelity": check_fidelity,
    "bench_guesses": check_guesses,
    "bench_context": check_context,
    "bench_mooncake": check_mooncake,
    "bench_overhead": check_overhead,
    "bench_policies": check_policies,
    "bench_prefetch": check_prefetch,
    "bench_quest": check_quest,
    "bench_replay": check_replay,
    "bench_resume": check_resume,
    "bench_sparse": check_sparse,
    "bench_store": check_store,
}

"""Decode a Mixture of Experts that doesn't fit: tiered_mem beside every other way to do it.

A random Qwen3-MoE of 1.4 GB decodes given tokens one by one, 1 thread. The offloading peers get
memory for a quarter of the experts: tiered_mem as its budget, the others (they map files) as page
cache; what is beyond it leaves the page cache before every token. Peers run in processes of their
own, interleaved, in rounds; medians over rounds are reported, all raw figures are in the results.

The limit is what no runtime could beat that misses as many bytes: the longer of computing (the
same model with all experts resident) and reading the missed bytes at the rate at which raw O_DIRECT
reads the same file, measured right before and after (the best of several sizes and readers).

    python benchmarks/bench_decode.py [--smoke] [--airllm-python PATH]

airllm 4.0 needs transformers 4.57, so it runs by an interpreter of another environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from decode_peers import OURS, PEERS, RESIDENT, folder_of
from random_model import SHAPES, default_work_dir, random_model
from raw_read import best_rate

RAM = "all-in-ram"
ACCELERATE = "accelerate.disk_offload"
SLACK_NBYTES = 200_000_000  # what peak anonymous memory may have beyond weights and budgets
_SAMPLE_SECONDS = 0.02


def main() -> None:
    options = _options()
    shape = SHAPES["smoke" if options.smoke else "full"]
    options.dir.mkdir(parents=True, exist_ok=True)
    checkpoint = random_model(shape, options.dir)
    # A smoke run lets peers write their files as they are measured: each start takes seconds.
    candidates = [] if options.smoke else options.peers
    failures = {name: error for name in candidates if (error := _prepare(name, options))}
    for name, error in failures.items():
        print(f"{name} does not run here: {error}", file=sys.stderr)
    peers = [name for name in options.peers if name not in failures]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            turn = number % len(peers)
            for name in peers[turn:] + peers[:turn]:
                rounds[name].append(_run(name, options, number, Path(scratch)))
                print(f"round {number} {_line(name, rounds[name][-1])}", file=sys.stderr)
            _compare_logits({name: runs[-1] for name, runs in rounds.items()})
    non_expert = _file_nbytes(checkpoint) - shape.experts_nbytes
    summary = _summarise(rounds, non_expert)
    _print(summary)
    common.write_results(
        options,
        {
            "machine": common.machine(options.dir),
            "settings": {
                "shape": vars(shape) | {"experts_nbytes": shape.experts_nbytes},
                "non_expert_nbytes": non_expert,
                "num_tokens": options.num_tokens,
                "num_warmup": options.num_warmup,
                "page_cache_share": options.page_cache,
                "threads": 1,
            },
            "does_not_run": failures,
            "summary": summary,
            "rounds": rounds,
        },
    )


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0], "decode")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    parser.add_argument("--num-tokens", type=int, help="measured tokens a round: 24, or 4")
    parser.add_argument("--num-warmup", type=int, help="tokens before them: 16, or 2")
    parser.add_argument("--peers", help="comma-separated; default: all that can run", default="")
    parser.add_argument(
        "--page-cache", type=float, default=0.25, help="share of each file that may stay cached"
    )
    parser.add_argument("--airllm-python", type=Path, help="interpreter of airllm's environment")
    options = parser.parse_args()
    full = not options.smoke
    options.rounds = options.rounds or (5 if full else 1)
    options.num_tokens = options.num_tokens or (24 if full else 4)
    options.num_warmup = options.num_warmup or (16 if full else 2)
    options.dir = options.dir or default_work_dir()
    names = [name.strip() for name in options.peers.split(",") if name.strip()]
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(unknown)}; there are: {', '.join(PEERS)}")
    smoke = [RAM, ACCELERATE, f"{OURS} next-gate lru"]
    options.peers = names or (list(PEERS) if full else smoke)
    return options


def _command(name: str, options: argparse.Namespace, out: Path, *more: str) -> list[str]:
    python = options.airllm_python if name == "airllm" else None
    command = [str(python or sys.executable), str(Path(__file__).with_name("decode_peers.py"))]
    command += [name, "--shape", "smoke" if options.smoke else "full"]
    command += ["--work-dir", str(options.dir), "--out", str(out), *more]
    return command


def _prepare(name: str, options: argparse.Namespace) -> str | None:
    """Let a peer write its files, unmeasured. Return why it doesn't run, if it doesn't."""
    with tempfile.TemporaryDirectory() as scratch:
        command = _command(name, options, Path(scratch) / "out.json", "--prepare")
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if done.returncode == 0:
        return None
    if name.startswith(OURS) or name == RAM:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _run(name: str, options: argparse.Namespace, number: int, scratch: Path) -> dict[str, Any]:
    """Decode in a subprocess, watching its memory; for our peers read the raw file around it."""
    store = folder_of(name, SHAPES["smoke" if options.smoke else "full"], options.dir) / "data.mdb"
    probe = store if name.startswith(OURS) and name != RESIDENT else None
    # A smoke run's first round packs the store as it goes: there is nothing to read before it.
    before = [best_rate(probe)] if probe and probe.exists() else []
    out = scratch / "out.json"
    command = _command(name, options, out, "--num-tokens", str(options.num_tokens))
    command += ["--num-warmup", str(options.num_warmup), "--seed", str(number)]
    command += ["--page-cache", str(options.page_cache)]
    log = scratch / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, env=_environment(), stdout=stderr, stderr=stderr)
        peak = max(_anonymous_nbytes(process), default=0)
    if process.returncode != 0:
        raise SystemExit(f"{name} failed in round {number}:\n{log.read_text()}")
    result: dict[str, Any] = json.loads(out.read_text())
    result["peak_anonymous_nbytes"] = max(peak, result["rss_anon_end"])
    result["tokens_per_second"] = len(result["seconds"]) / sum(result["seconds"])
    result["logits"] = np.load(out.with_suffix(".npy"))
    if probe:
        result["raw_bytes_per_second"] = [*before, best_rate(probe)]
    return result


def _environment() -> dict[str, str]:
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | quiet


def _anonymous_nbytes(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """Yield a running process's memory that no file stands behind, again and again until it ends.

    VmHWM would count mapped file pages, which are the page cache's.
    """
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        yield sum(
            int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem"))
        )
        time.sleep(_SAMPLE_SECONDS)


def _compare_logits(runs: dict[str, dict[str, Any]]) -> None:
    """Replace each run's logits by their distance to the all-in-RAM run on the same tokens."""
    stock = runs[RAM]["logits"] if RAM in runs else None
    for run in runs.values():
        logits = run.pop("logits") if run is not runs.get(RAM) else stock
        if stock is not None:
            run["max_abs_dlogit"] = float(np.abs(logits - stock).max())
            run["equal_argmax_share"] = float((logits.argmax(-1) == stock.argmax(-1)).mean())
    runs.get(RAM, {}).pop("logits", None)


def _limit(run: dict[str, Any], compute_seconds: float) -> dict[str, float]:
    """Return the tokens/s that no runtime beats which misses the bytes that this run missed."""
    stats, num_tokens = run["stats"], len(run["seconds"])
    # What a prefetch brought in time was missed as well; what it brought in vain was not.
    missed = (stats["nbytes_missed"] + stats["nbytes_prefetch_used"]) / num_tokens
    raw = statistics.mean(run["raw_bytes_per_second"])
    seconds = max(compute_seconds, missed / raw)
    return {
        "missed_mb_per_token": missed / 1e6,
        "raw_mb_per_second": raw / 1e6,
        "limit_tokens_per_second": 1 / seconds,
        "share_of_limit": run["tokens_per_second"] * seconds,
    }


def _summarise(rounds: dict[str, list[dict[str, Any]]], non_expert: int) -> dict[str, Any]:
    """Return the medians over rounds of everything reported, by peer."""
    summary: dict[str, Any] = {}
    resident = [run["tokens_per_second"] for run in rounds.get(RESIDENT, [])]
    for name, runs in rounds.items():
        rows = [_figures(run) for run in runs]
        if name.startswith(OURS):
            for number, (row, run) in enumerate(zip(rows, runs, strict=True)):
                allowed = non_expert + run["budget_nbytes"] + SLACK_NBYTES
                row["anonymous_mb_allowed"] = allowed / 1e6
                if resident and "raw_bytes_per_second" in run:
                    row |= _limit(run, 1 / resident[number])
        summary[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        speed = [run["tokens_per_second"] for run in runs]
        for peer, others in rounds.items():
            ratio = common.paired_ratio(speed, [run["tokens_per_second"] for run in others])
            summary[name].setdefault("times_faster_than", {})[peer] = ratio
    return summary


def _figures(run: dict[str, Any]) -> dict[str, float]:
    num_tokens = len(run["seconds"])
    figures = {
        "tokens_per_second": run["tokens_per_second"],
        "median_token_ms": statistics.median(run["seconds"]) * 1e3,
        "block_read_mb_per_token": sum(run["block_read_nbytes"]) / num_tokens / 1e6,
        "cached_mb_before_token": statistics.mean(run["cached_nbytes_before"]) / 1e6,
        "peak_anonymous_mb": run["peak_anonymous_nbytes"] / 1e6,
        "imported_anonymous_mb": run["rss_anon_imported"] / 1e6,
    }
    if "max_abs_dlogit" in run:
        figures |= {k: run[k] for k in ("max_abs_dlogit", "equal_argmax_share")}
    if "stats" in run:
        stats = run["stats"]
        figures |= {
            "hit_rate": stats["hit_rate"],
            "stall_ms_per_token": stats["stall_seconds"] / num_tokens * 1e3,
            "prefetch_precision": stats["prefetch_precision"] or 0.0,
            "prefetch_recall": stats["prefetch_recall"] or 0.0,
            "prefetch_wasted_mb_per_token": stats["nbytes_prefetch_wasted"] / num_tokens / 1e6,
        }
    return figures


def _file_nbytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def _line(name: str, run: dict[str, Any]) -> str:
    read = sum(run["block_read_nbytes"]) / len(run["seconds"]) / 1e6
    return (
        f"{name:38s} {run['tokens_per_second']:6.2f} tok/s, {read:6.1f} MB read a token, "
        f"{run['peak_anonymous_nbytes'] / 1e6:.0f} MB anonymous"
    )


def _print(summary: dict[str, Any]) -> None:
    columns = {
        "tokens_per_second": "tok/s",
        "share_of_limit": "of limit",
        "block_read_mb_per_token": "read MB/tok",
        "hit_rate": "hits",
        "stall_ms_per_token": "stall ms",
        "prefetch_precision": "precision",
        "prefetch_recall": "recall",
        "peak_anonymous_mb": "anon MB",
        "anonymous_mb_allowed": "allowed",
        "max_abs_dlogit": "|dlogit|",
        "equal_argmax_share": "same token",
    }
    rows = []
    for name, figures in summary.items():
        faster = figures["times_faster_than"].get(ACCELERATE, "")
        rows.append([name, faster, *(figures.get(key, "") for key in columns)])
    common.print_table(rows, ["peer", "x accelerate", *columns.values()])


if __name__ == "__main__":
    main()

"""What the benchmarks of simulated runs share: which traces, which links, and the grid of runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from tiered_mem.cli.output import count_bar
from tiered_mem.compare import plan
from tiered_mem.compare_options import parse_machine
from tiered_mem.trace import Form, Trace, TraceHeader

BUDGETS = ("10%", "25%", "50%")
COMMITTED = Path(__file__).parent / "traces"


def parser(description: str, name: str, compute: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all benchmarks and those of simulated runs."""
    result = common.parser(description, name)
    result.add_argument(
        "traces", nargs="*", type=Path, help="trace files (default: those in benchmarks/traces)"
    )
    result.add_argument("-j", "--jobs", type=int, default=0, help="processes; 0 for one a core")
    result.add_argument(
        "--compute", default=compute, help="rate at which the device reads weights, if unrecorded"
    )
    return result


def find_traces(options: argparse.Namespace, folder: Path) -> dict[Path, Trace]:
    """Return the traces to run by their files; a smoke run without any makes one in `folder`.

    Exits with a message if there are none, or two of one name: results know traces by name alone.
    """
    paths = options.traces or sorted(COMMITTED.glob("*.npz"))
    if options.smoke and not options.traces:
        paths = [folder / "smoke.npz"]
        made_up_trace().save(paths[0], overwrite=True)
    if not paths:
        raise SystemExit("no trace: name trace files (tiered-mem trace import or record makes one)")
    if len({path.stem for path in paths}) < len(paths):
        raise SystemExit("two traces of one name: results tell them apart by the file's name")
    return {path: Trace.load(path) for path in paths}


def run_grid(
    options: argparse.Namespace,
    trace: Path,
    *,
    eviction: Sequence[str],
    prefetch: Sequence[str],
    nvme: str,
) -> list[dict[str, Any]]:
    """Simulate all of it over a trace at `BUDGETS`, and return every run with its bounds."""
    comparison = plan(
        [trace],
        eviction=eviction,
        prefetch=prefetch,
        hbm=BUDGETS,
        machine=parse_machine(f"nvme={nvme}", options.compute),
    )
    with count_bar(f"{trace.stem}, NVMe of {nvme}") as progress:
        runs: list[dict[str, Any]] = comparison.run(num_processes=options.jobs, progress=progress)[
            "runs"
        ]
    return runs


def describe(trace: Trace) -> dict[str, Any]:
    """Return what a results file says of a trace: nothing of where it lay."""
    return {
        "name": trace.name,
        "model": trace.header.model,
        "nbytes": trace.total_nbytes,
        "num_events": trace.num_events,
        "num_accesses": trace.num_accesses,
    }


def made_up_trace() -> Trace:
    """Return routes of 40 tokens through 4 layers of 16 experts, 2 a token; some are favourites."""
    num_tokens, num_layers, num_experts, top_k = 40, 4, 16, 2
    random = np.random.default_rng(0)
    liking = random.gumbel(size=(1, num_layers, num_experts))
    scores = 2 * liking + random.gumbel(size=(num_tokens, num_layers, num_experts))
    index = np.argsort(scores)[:, :, -top_k:]
    step, layer, _ = np.indices(index.shape)
    nbytes = 1 << 20
    header = TraceHeader(
        Form.EVENTS,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_nbytes=(nbytes,) * num_layers,
    )
    return Trace.from_rows(
        header, index=index.ravel(), step=step.ravel(), layer=layer.ravel(), nbytes=nbytes
    )

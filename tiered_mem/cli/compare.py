"""`tiered-mem compare`: which policy and which predictor, at which budget, on which links."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tiered_mem.cli import output
from tiered_mem.compare_options import DEFAULT_LINKS

_EVICTION = "adaptive,lru,lfu,per-layer(lfu),arc,s3-fifo,w-tinylfu,least-stale"


def compare(
    traces: Annotated[list[Path], typer.Argument(help="Trace files; see tiered-mem trace.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The report's directory, a new one.")],
    eviction: Annotated[
        str, typer.Option(help="Policies with commas between; see tiered-mem policies.")
    ] = _EVICTION,
    prefetch: Annotated[
        str, typer.Option(help="Predictors; auto: none and all that a trace can drive.")
    ] = "auto",
    hbm: Annotated[
        str, typer.Option(help="Budgets: 6GiB, or shares of all blocks that the trace's model has.")
    ] = "10%,25%,50%",
    dram: Annotated[str, typer.Option(help="Budget of the second tier, 0 for none.")] = "0",
    link: Annotated[
        str, typer.Option(help="Simulated links into HBM: bandwidth[:latency].")
    ] = DEFAULT_LINKS,
    compute: Annotated[
        str, typer.Option(help="Rate at which the device reads weights, if no time is recorded.")
    ] = "300GB/s",
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Processes; 0 for one a core.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a former report.")] = False,
) -> None:
    """Simulate every policy with every predictor at every budget, and write a report."""
    from tiered_mem.compare import plan
    from tiered_mem.compare_options import parse_machine, split_list
    from tiered_mem.report import new_directory, write_report

    options = {
        "eviction": eviction,
        "prefetch": prefetch,
        "hbm": hbm,
        "dram": dram,
        "link": link,
        "compute": compute,
    }
    comparison = plan(
        traces,
        eviction=split_list(eviction),
        prefetch=split_list(prefetch),
        hbm=split_list(hbm),
        dram=dram,
        machine=parse_machine(link, compute),
    )
    with new_directory(out, force=force) as directory:
        with output.count_bar("simulating") as progress:
            results = comparison.run(num_processes=jobs, progress=progress)
        results = {"command": _command(traces, options, out), **results}
        write_report(directory, results)
    print(f"{len(results['runs'])} runs; open {out / 'index.html'}")


def _command(traces: list[Path], options: dict[str, str], out: Path) -> str:
    """Return the command in full, defaults written out: they may change."""
    words = ["tiered-mem", "compare", *map(str, traces)]
    for name, value in options.items():
        words += [f"--{name}", value]
    return shlex.join([*words, "-o", str(out)])

"""`tiered-mem train-head`: a predictor for one model, from a recorded trace."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tiered_mem.cli import output


def train_head(
    trace: Annotated[Path, typer.Argument(help="A trace recorded with hidden states.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The head's file, an npz.")],
    held_out: Annotated[
        float, typer.Option(help="Share of the text kept from training, to judge by.")
    ] = 0.25,
    units: Annotated[
        int, typer.Option(min=0, help="Of the MLP's inner layer; 0 for a linear head.")
    ] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the trace.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the head's file.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Train the head of --prefetch "learned(FILE)", and say what it reaches beside the others."""
    from tiered_mem.atomic_file import check_new, new_file
    from tiered_mem.trace import Trace

    check_new(out, overwrite=force)
    from tiered_mem.hf.head import train_head as train

    loaded = Trace.load(trace)
    with output.status("training", hidden=as_json):
        head, report = train(loaded, held_out=held_out, units=units, epochs=epochs, seed=seed)
    with new_file(out, overwrite=force) as file:
        head.save(file)
    if as_json:
        recall = {name: found._asdict() for name, found in report.recall.items()}
        output.print_json({"head": str(out)} | asdict(report) | {"recall": recall})
        return
    rows = [["", "recall at k", "at 2k"]]
    rows += [
        [name, f"{100 * found.at_k:.1f} %", f"{100 * found.at_2k:.1f} %"]
        for name, found in report.recall.items()
    ]
    output.print_table(rows, title=f"on {report.num_held_out} layer steps held out of {trace}")
    print(f'\n{out}: trained on {report.num_trained} layer steps; use it as "learned({out})"')

"""`tiered-mem trace`: traces in, out, and what they ask of a cache."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiered_mem.cli import output
from tiered_mem.cli.record import record

if TYPE_CHECKING:
    from tiered_mem.trace_info import TraceInfo

app = typer.Typer(
    help="Record and import traces, look into them, export them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    """What `trace import` reads; see `tiered_mem.trace_formats`."""

    route_csv = "route-csv"
    moe_logger = "moe-logger"
    bailian = "bailian"
    mooncake = "mooncake"
    oracle_general = "oracle-general"


class ExportFormat(StrEnum):
    """What `trace export` writes."""

    oracle_general = "oracle-general"


ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")]


app.command()(record)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="The file, compressed with zstd or not.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The trace to write, an .npz.")],
    format: Annotated[
        Format | None, typer.Option(help="Default: told by the file's content.")
    ] = None,
    token_nbytes: Annotated[
        str | None,
        typer.Option(
            help="Bytes of KV a token takes over all layers, where the file has none "
            "(mooncake, bailian). Default: 128KiB, a Llama-3-8B in 16 bits."
        ),
    ] = None,
    expert_nbytes: Annotated[
        str | None,
        typer.Option(
            help="Bytes of an expert, where the file has none (moe-logger). Default: 1MiB."
        ),
    ] = None,
    force: ForceOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Turn a route CSV, prefix or MoE-logger JSONL, or oracleGeneral file into a trace."""
    from tiered_mem.atomic_file import check_new
    from tiered_mem.config import format_size
    from tiered_mem.trace_formats import import_trace

    check_new(out, overwrite=force)
    with output.status(f"reading {source}", hidden=as_json):
        trace = import_trace(
            source, format=format, token_nbytes=token_nbytes, expert_nbytes=expert_nbytes
        )
        trace.save(out, overwrite=force)
    if as_json:
        output.print_json(
            {
                "trace": str(out),
                "form": trace.header.form,
                "model": trace.header.model,
                "num_rows": trace.num_rows,
                "num_events": trace.num_events,
                "num_accesses": trace.num_accesses,
                "num_blocks": len(trace.blocks[0]),
                "total_nbytes": trace.total_nbytes,
                "note": trace.header.note,
            }
        )
        return
    note = f" ({trace.header.note})" if trace.header.note else ""
    print(
        f"{out} holds {trace.num_events} events with {trace.num_accesses} accesses to "
        f"{len(trace.blocks[0])} blocks; all there are take {format_size(trace.total_nbytes)}{note}"
    )


@app.command()
def info(
    trace: Annotated[Path, typer.Argument(help="A trace made by import or record.")],
    as_json: output.JsonOption = False,
) -> None:
    """Show what a trace asks of a cache: cycle, reuse distances, spread, ceiling."""
    from tiered_mem.trace import Trace
    from tiered_mem.trace_info import examine

    with output.status(f"reading {trace}", hidden=as_json):
        found = examine(Trace.load(trace))
    if as_json:
        output.print_json(found.as_dict())
        return
    output.print_table(_rows(found), title=found.name)


@app.command()
def export(
    trace: Annotated[Path, typer.Argument(help="A trace made by import or record.")],
    out: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write; .zst compresses it.")
    ],
    format: Annotated[
        ExportFormat, typer.Option(help="Flat records, as libCacheSim reads them.")
    ] = ExportFormat.oracle_general,
    force: ForceOption = False,
) -> None:
    """Write a trace's accesses, one after another, for libCacheSim."""
    from tiered_mem.atomic_file import check_new
    from tiered_mem.trace import Action, Trace
    from tiered_mem.trace_formats import export_trace

    check_new(out, overwrite=force)
    # To a cache that knows no removal, a block that is created is one that is asked for.
    loaded = Trace.load(trace).only(Action.READ, Action.CREATE)
    export_trace(loaded, out, overwrite=force)
    print(f"{out} holds {loaded.num_rows} records in {format}")


_RECORDED = {
    "row_token": "token ids",
    "gap_seconds": "times between events",
    "compute_seconds": "times of events",
    "ahead_index": "predictions of the next layer",
    "hidden": "hidden states",
}


def _rows(found: TraceInfo) -> list[list[str]]:
    from tiered_mem.config import format_size as size

    def share(part: float) -> str:
        return f"{100 * part:.1f} %"

    def counts(by_name: dict[str, int]) -> str:
        return ", ".join(f"{n} {name.lower()}" for name, n in by_name.items() if n)

    model = f"{found.num_layers} layer(s)"
    if found.num_experts:
        model += f" of {found.num_experts} experts"
    if found.top_k:
        model += f", top-{found.top_k}"
    distances = ", ".join(f"{n} at {percent} %" for percent, n in found.reuse_distances.items())
    if found.sampled_share < 1:
        distances += f" (from {share(found.sampled_share)} of the blocks)"
    accesses = counts(found.accesses_by_kind)
    if found.form == "events":
        accesses += f" ({counts(found.accesses_by_phase)})"
    rows = [
        ["model", f"{found.model or 'unknown'}: {model}"],
        ["source", found.source],
        ["note", found.note],
        ["form", found.form],
        ["recorded", ", ".join(_RECORDED[column] for column in found.recorded)],
        ["events", f"{found.num_events} in {found.num_sequences} sequence(s)"],
        ["accesses", f"{accesses}, {size(found.accessed_nbytes)} in all"],
        ["blocks seen", f"{found.num_blocks}, {size(found.nbytes)} of {size(found.total_nbytes)}"],
        [
            "largest event",
            f"{found.largest_event_num_blocks} blocks, {size(found.largest_event_nbytes)}",
        ],
    ]
    if found.form != "requests":
        bound = "at most " if found.form == "prefix" else ""
        rows.insert(6, ["tokens", f"{bound}{found.num_tokens}"])
    if found.num_created or found.num_removed:
        rows.insert(7, ["come and go", f"{found.num_created} created, {found.num_removed} removed"])
    if found.num_rows != found.num_accesses:
        rows.insert(7, ["rows", f"{found.num_rows}, before an event's equal blocks are merged"])
    if found.cycle_num_slots is not None and found.cycle_nbytes is not None:
        cycle = f"{found.cycle_num_slots} slots, {size(found.cycle_nbytes)}"
        rows.append(["cycle", f"{cycle}: with less, a global LRU hits next to nothing"])
    rows += [
        [
            "ceiling",
            f"{share(found.ceiling)} hits with an endless cache; {found.num_compulsory_misses} "
            "misses are compulsory",
        ],
        ["reuse distance", distances or "no block is asked for twice"],
        ["spread", f"the busiest tenth of the blocks gets {share(found.top_tenth_share)}"],
    ]
    if found.form == "events" and found.layer_entropy is not None:
        entropy = f"{share(found.layer_entropy)} of the highest there can be"
        rows.append(["entropy of a layer", entropy])
    if found.previous_token_recall is not None:
        recall = f"{share(found.previous_token_recall)} of decode's blocks"
        rows.append(["as the token before", recall])
    return [row for row in rows if row[1]]

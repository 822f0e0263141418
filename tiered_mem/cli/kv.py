"""`tiered-mem kv`: stored prefixes of keys and values."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiered_mem.cli import output

if TYPE_CHECKING:
    from tiered_mem.prefixes import PrefixStore

app = typer.Typer(help="Stored prefixes of keys and values (--session, prefixes=).")

StoreArgument = Annotated[Path, typer.Argument(help="The directory of the stored prefixes.")]
_DAY = 86400.0


@app.command()
def ls(store: StoreArgument, as_json: output.JsonOption = False) -> None:
    """List what is stored, by model."""
    from tiered_mem.prefixes import PrefixStore

    with PrefixStore.inspect(store) as prefixes:
        models = [_describe(prefixes, root) for root in prefixes.store.metadata["models"]]
    if as_json:
        output.print_json({"store": str(store), "models": models})
    else:
        output.print_table(_rows(models))


@app.command()
def gc(
    store: StoreArgument,
    capacity: Annotated[
        str | None, typer.Option(help="Keep so many bytes: 10GiB. The least recently used go.")
    ] = None,
    max_age: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Remove what wasn't used for these.")
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Remove stored prefixes, and what a damaged store has without use."""
    from tiered_mem.config import format_size, parse_size
    from tiered_mem.prefixes import PrefixStore

    limit = None if capacity is None else parse_size(capacity)
    with PrefixStore.inspect(store, mode="w") as prefixes:
        num_removed = prefixes.gc(
            capacity=limit, max_age=None if max_age is None else max_age * _DAY
        )
        left, nbytes = len(prefixes.index.records), prefixes.index.nbytes
    if as_json:
        output.print_json({"num_removed": num_removed, "num_blocks": left, "nbytes": nbytes})
    else:
        print(f"{num_removed} blocks of tokens removed, {left} left: {format_size(nbytes)}")


@app.command()
def verify(
    store: StoreArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged and what follows it.")
    ] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Read everything that is stored. Exits with 1 if any of it is damaged."""
    from tiered_mem.prefixes import PrefixStore

    with PrefixStore.inspect(store, mode="w" if repair else "r") as prefixes:
        damaged = prefixes.verify()
        num_broken, num_orphans = len(prefixes.broken), len(prefixes.orphans)
        num_removed = 0
        if repair:
            num_removed = sum(prefixes.damaged(record) for record in damaged) + prefixes.gc()
        num_blocks = len(prefixes.index.records)
    sound = not damaged and not num_broken and not num_orphans
    if as_json:
        output.print_json(
            {
                "store": str(store),
                "num_blocks": num_blocks,
                "num_damaged": len(damaged),
                "num_broken_records": num_broken,
                "num_orphans": num_orphans,
                "num_removed": num_removed,
                "sound": sound or repair,
            }
        )
    elif sound:
        print(f"{store} is sound: {num_blocks} blocks of tokens")
    else:
        after = (
            f"{num_removed} removed, with what followed them; {num_blocks} left"
            if repair
            else "--repair removes them, with what follows"
        )
        print(
            f"{store}: {len(damaged)} blocks of tokens damaged, {num_broken} records unreadable, "
            f"{num_orphans} payloads of no record: {after}"
        )
    if not sound and not repair:
        raise typer.Exit(1)


def _describe(prefixes: PrefixStore, root: str) -> dict[str, Any]:
    """What one model, by the root of its chains, has."""
    model = prefixes.store.metadata["models"][root]
    records = [r for r in prefixes.index.records.values() if r.root.hex() == root]
    num_children = Counter(record.parent for record in records)
    return {
        "fingerprint": model["fingerprint"],
        "layout": model["layout"],
        "num_chains": sum(record.hash not in num_children for record in records),
        "num_blocks": len(records),
        "num_tokens": sum(record.num_tokens for record in records),
        "nbytes": sum(record.nbytes for record in records),
        "last_used": max((record.last_used for record in records), default=None),
    }


def _rows(models: list[dict[str, Any]]) -> list[list[str]]:
    from tiered_mem.config import format_size

    rows = [["model", "layout", "chains", "tokens", "size", "last used"]]
    for model in models:
        used = model["last_used"]
        rows.append(
            [
                model["fingerprint"][:12],
                " ".join(f"{key}={value}" for key, value in sorted(model["layout"].items())),
                str(model["num_chains"]),
                str(model["num_tokens"]),
                format_size(model["nbytes"]),
                "" if used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(used)),
            ]
        )
    return rows

"""`tiered-mem verify`: every checksum of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiered_mem.cli import output

if TYPE_CHECKING:
    from tiered_mem.doctor import StoreHealth


def verify(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    repair: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="Write damaged and missing blocks again from this."
        ),
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Read every block of a store. Exits with 1, naming them, if any is damaged or missing."""
    from tiered_mem.doctor import examine_store

    with output.progress_bar("verifying", hidden=as_json) as progress:
        health = found = examine_store(store, progress=progress)
    if repair is not None and not found.sound:
        from tiered_mem.hf.repair import repair as repair_store

        with output.progress_bar("repairing", hidden=as_json) as progress:
            repair_store(store, repair, found.damaged, progress=progress)
        health = examine_store(store)
    if as_json:
        output.print_json(
            {
                "store": str(store),
                "num_blocks": health.num_blocks,
                "nbytes": health.nbytes,
                "damaged": [key._asdict() | {"kind": key.kind.name} for key in found.damaged],
                "missing": [key._asdict() | {"kind": key.kind.name} for key in found.missing],
                "num_repaired": _num_bad(found) - _num_bad(health),
                "sound": health.sound,
            }
        )
    else:
        _print_health(store, found, health)
    if not health.sound:
        raise typer.Exit(1)


def _num_bad(health: StoreHealth) -> int:
    return len(health.damaged) + len(health.missing)


def _print_health(store: Path, found: StoreHealth, health: StoreHealth) -> None:
    from tiered_mem.config import format_size

    for key in found.damaged:
        print(f"damaged: {key}")
    if found.missing:
        print(f"missing: {len(found.missing)} blocks from {found.missing[0]} on")
    if health.sound:
        repaired = f"; {_num_bad(found)} repaired" if not found.sound else ""
        blocks = f"{health.num_blocks} blocks, {format_size(health.nbytes)}"
        print(f"{store} is sound: {blocks}{repaired}")
    else:
        print(
            f"{store} is not sound: {len(health.damaged)} blocks damaged, {len(health.missing)} "
            "missing; repair it with --repair CHECKPOINT"
        )

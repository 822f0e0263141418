"""`tiered-mem pack`: a checkpoint's experts into a store."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tiered_mem.cli import output


class Dtype(StrEnum):
    """What the weights are held in: the checkpoint's own by default."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Codec(StrEnum):
    """How blocks are stored. Both are lossless."""

    none = "none"
    zstd = "zstd"


DtypeOption = Annotated[Dtype, typer.Option(help="The dtype the model runs in.")]
CodecOption = Annotated[Codec, typer.Option(help="How to store blocks: zstd takes less room.")]


def pack(
    checkpoint: Annotated[str, typer.Argument(help="A directory or hub id of a model.")],
    store: Annotated[Path, typer.Argument(help="The store's directory, made if there is none.")],
    dtype: DtypeOption = Dtype.auto,
    codec: CodecOption = Codec.none,
    capacity: Annotated[
        str | None, typer.Option(help="The most bytes the store may take, as 20GiB.")
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Write a checkpoint's experts into a store. Goes on where an interrupted pack left off."""
    from tiered_mem.config import format_size, parse_size

    limit = None if capacity is None else parse_size(capacity)
    from tiered_mem.hf.checkpoint import Checkpoint
    from tiered_mem.hf.pack import pack as pack_checkpoint

    with (
        Checkpoint.open(checkpoint, dtype=dtype.value) as source,
        output.progress_bar("packing", hidden=as_json) as progress,
    ):
        report = pack_checkpoint(
            source, store, codec=codec.value, capacity=limit, progress=progress
        )
    file_nbytes = sum(f.stat().st_blocks * 512 for f in store.iterdir())
    if as_json:
        output.print_json(
            asdict(report)
            | {"store": str(store), "store_nbytes": file_nbytes, "codec": codec.value}
        )
        return
    already = report.num_blocks - report.num_packed
    there = f", {already} of them there already" if already else ""
    print(
        f"{store} holds {report.num_blocks} experts{there}: {format_size(report.nbytes)} in "
        f"{format_size(file_nbytes)} on disk; {format_size(report.nbytes_packed)} packed in "
        f"{report.seconds:.1f} s"
    )

"""`tiered-mem doctor`: what this machine offers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiered_mem.cli import output

if TYPE_CHECKING:
    from tiered_mem.config import WorkingSet
    from tiered_mem.doctor import Advice, Filesystem, Gpu, Link, Memory


def doctor(
    directory: Annotated[
        Path, typer.Argument(help="Where a store would lie: its disk is measured.")
    ] = Path("."),
    checkpoint: Annotated[
        str | None, typer.Option(help="A model to recommend budgets for: directory or hub id.")
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes to write and read.")] = "256MiB",
    as_json: output.JsonOption = False,
) -> None:
    """Measure the links between the tiers and recommend budgets."""
    from tiered_mem import doctor as library
    from tiered_mem.config import parse_size

    nbytes = parse_size(size)
    working_set = _examine(checkpoint) if checkpoint else None
    gpus = library.examine_gpus()
    memory = library.examine_memory()
    filesystem = library.examine_filesystem(directory)
    with output.status("measuring", hidden=as_json):
        links = list(library.measure_links(directory, nbytes=nbytes))
        links += [library.measure_gpu(gpu) for gpu in gpus if not gpu.shares_memory]
    gpu_memory = gpus[0].memory if gpus and _torch_has_cuda() else None
    advice = library.advise(memory.spare_nbytes, working_set, gpu_memory)
    if as_json:
        output.print_json(
            {
                "cuda_devices": [asdict(gpu) for gpu in gpus],
                "torch_has_cuda": _torch_has_cuda(),
                "memory": asdict(memory),
                "filesystem": asdict(filesystem),
                "links": [asdict(link) for link in links],
                "working_set": asdict(working_set) if working_set else None,
                "advice": asdict(advice),
            }
        )
        return
    _print_tiers(gpus, memory, filesystem)
    _print_links(links)
    _print_advice(working_set, advice)


def _examine(checkpoint: str) -> WorkingSet:
    from tiered_mem.hf.working_set import examine_checkpoint

    return examine_checkpoint(checkpoint)


def _torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def _describe(gpu: Gpu) -> str:
    from tiered_mem.config import format_size as size

    memory = f"{size(gpu.free_nbytes)} of {size(gpu.total_nbytes)} free"
    if gpu.shares_memory:
        memory = "shares the CPU's memory: blocks are read in place, without a DRAM tier"
    kernels = "" if gpu.kernels is None else f"; no kernels ({gpu.kernels})"
    return (
        f"{gpu.device}: {gpu.name} (compute capability {gpu.compute_capability}, driver for CUDA "
        f"{gpu.driver_version}), {memory}{kernels}"
    )


def _print_tiers(gpus: list[Gpu], memory: Memory, filesystem: Filesystem) -> None:
    from tiered_mem.config import format_size as size

    found = [_describe(gpu) for gpu in gpus] or ["no CUDA device; host memory plays its part"]
    if gpus and not _torch_has_cuda():
        found.append("this torch is built without CUDA and can't use it: install one with it")
    limit = "unlimited" if memory.lock_limit is None else size(memory.lock_limit)
    direct = "O_DIRECT works" if filesystem.direct_io else "no O_DIRECT: reads cost a copy"
    rows = [
        *(("" if i else "HBM", line) for i, line in enumerate(found)),
        ("DRAM", f"{size(memory.total_nbytes)}, {size(memory.available_nbytes)} available"),
        ("", f"pinning {'works' if memory.can_lock else 'is refused'} (ulimit -l: {limit})"),
        ("", f"transparent huge pages: {memory.huge_pages}"),
        ("NVMe", f"{filesystem.path}: {filesystem.kind} on {filesystem.device}, {direct}"),
        ("", f"{size(filesystem.free_nbytes)} free"),
    ]
    output.print_table(rows, title="Tiers")


def _print_links(links: list[Link]) -> None:
    from tiered_mem.config import format_size as size

    rows = [(link.name, link.method, f"{size(link.bytes_per_second)}/s") for link in links]
    output.print_table(rows, title="\nLinks, in blocks of 4 MiB")
    print("  What was just written may still be in a cache below: old blocks can read slower.")


def _print_advice(working_set: WorkingSet | None, advice: Advice) -> None:
    from tiered_mem.config import format_size as size

    rows = []
    if working_set is not None:
        rows = [
            ("all experts", size(working_set.experts_nbytes)),
            ("one token, all layers", f"{size(working_set.cycle_nbytes)} (a cycle)"),
            ("one token, one layer", f"{size(working_set.event_nbytes)} (an event, the least HBM)"),
        ]
    rows.append((f"--hbm {advice.hbm} --dram {advice.dram}", advice.why))
    output.print_table(rows, title="\nBudgets")

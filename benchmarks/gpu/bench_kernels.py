"""The row kernels beside torch's own operations, and how long the kernels take to compile.

Rows of 16 B to 16 KiB, gathered from a page-locked table and from one on the device, GB/s, beside
`index_select` (from host memory: gathered there, then copied). Ids to slots in one launch beside
torch's operations, in microseconds. Both images, nvcc's and CuPy's, where they are there.

    python benchmarks/gpu/bench_kernels.py [--smoke] [--device cuda:0]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import gpu_common
import torch
from bars import common, print_bars

from tiered_mem import _core
from tiered_mem.device import kernels
from tiered_mem.errors import DeviceError

ROW_NBYTES = (16, 64, 264, 1024, 1412, 2560, 4096, 16384)
#: Rows, top-k, experts: a token, a batch, a prompt of 4096 tokens.
REMAPS = ((8, 8, 128), (512, 8, 128), (32768, 8, 128), (32768, 8, 512))
GRID, BLOCK = 64, 512


def cores(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a core with kernels for each image there is, and what is known of each image."""
    if device.type != "cuda":
        return {}, {}
    found, images = {}, {}
    for way in ("fatbin", "cupy"):
        os.environ["TIERED_MEM_KERNELS"] = way
        core = _core.CudaDevice(device.index or 0)
        start = time.perf_counter()
        try:
            image = kernels.kernel_image(core.compute_capability)
            core.load_kernels(image)
        except DeviceError as error:
            images[way] = {"missing": str(error)}
            continue
        images[way] = {"nbytes": len(image), "seconds": time.perf_counter() - start}
        found[way] = core
    return found, images


def gathers(options: Any, by_image: dict[str, Any], total: int) -> list[dict[str, Any]]:
    device = options.device
    cuda = device.type == "cuda"
    on_host = torch.ones(total, dtype=torch.uint8, pin_memory=cuda)
    lines = []
    for table_on, table in {"host": on_host, "device": on_host.to(device)}.items():
        for nbytes in ROW_NBYTES:
            num_rows = total // nbytes
            ids = torch.randint(num_rows, (min(num_rows, 32768),)).to(table.device)
            near = ids.to(device)
            rows = torch.empty(len(ids), nbytes, dtype=torch.uint8, device=device)
            whole = table[: num_rows * nbytes].view(num_rows, nbytes)

            def by_torch(whole: Any = whole, ids: Any = ids, rows: Any = rows) -> None:
                rows.copy_(whole.index_select(0, ids), non_blocking=True)

            works: dict[str, Callable[[], Any]] = {"torch": by_torch}
            arguments = [rows.data_ptr(), table.data_ptr(), near.data_ptr(), len(ids), nbytes]
            for name, core in by_image.items():
                works[name] = lambda core=core, arguments=arguments, nbytes=nbytes: core.launch(
                    "tiered_mem_gather_rows", (GRID, 1, 1), (BLOCK, 1, 1), [*arguments, nbytes]
                )
            seconds = rounds_of(device, works, options.rounds)
            moved = nbytes * len(ids)
            rates = {name: [moved / took for took in times] for name, times in seconds.items()}
            lines.append(
                {"row_nbytes": nbytes, "table": table_on, "num_rows": len(ids), "rates": rates}
            )
    return lines


def remaps(options: Any, by_image: dict[str, Any]) -> list[dict[str, Any]]:
    device = options.device
    lines = []
    for num_rows, top_k, num_experts in REMAPS:
        ids = torch.randint(num_experts, (num_rows,), device=device)
        slots = torch.randperm(num_experts, device=device).int()
        table = torch.where(slots < num_experts // 2, slots, -1)
        window = {"num_slots": num_experts // 2, "top_k": top_k}
        works = {
            name: lambda core=core, ids=ids, table=table, window=window: kernels.remap_ids(
                core, ids, table, **window
            )
            for name, core in {"torch": None, **by_image}.items()
        }
        seconds = rounds_of(device, works, options.rounds)
        lines.append({"num_rows": num_rows, "num_experts": num_experts, "seconds": seconds})
    return lines


def rounds_of(
    device: torch.device, works: dict[str, Callable[[], Any]], num_rounds: int
) -> dict[str, list[float]]:
    """Return seconds a call, from 20 calls in a row each round, the ways taking turns."""
    for work in works.values():
        work()

    def repeat(work: Callable[[], Any]) -> Callable[[], float]:
        return lambda: gpu_common.seconds_of(device, lambda: [work() for _ in range(20)]) / 20

    return common.interleave({name: repeat(work) for name, work in works.items()}, num_rounds)


def main() -> None:
    parser = gpu_common.parser(__doc__.splitlines()[0], "kernels")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    options = gpu_common.parse(parser)
    options.rounds = options.rounds or (1 if options.smoke else 5)
    by_image, images = cores(options.device)
    rows = gathers(options, by_image, 1 << 20 if options.smoke else 1 << 30)
    ids = remaps(options, by_image)
    summary = {
        "gathers": [
            {key: line[key] for key in ("row_nbytes", "table", "num_rows")}
            | {"gb_per_second": common.median_of(scaled(line["rates"], 1e-9))}
            for line in rows
        ],
        "remaps": [
            {key: line[key] for key in ("num_rows", "num_experts")}
            | {"microseconds": common.median_of(scaled(line["seconds"], 1e6))}
            for line in ids
        ],
    }
    results = gpu_common.describe(options) | {
        "settings": {"rounds": options.rounds, "grid": GRID, "block": BLOCK},
        "images": images,
        "summary": summary,
        "bars": [],
        "rounds": {"gathers": rows, "remaps": ids},
    }
    for lines, first, figures in (
        (summary["gathers"], ("row_nbytes", "table"), "gb_per_second"),
        (summary["remaps"], ("num_rows", "num_experts"), "microseconds"),
    ):
        table = [[*(line[key] for key in first), *line[figures].values()] for line in lines]
        common.print_table(table, [*first, *(f"{name} {figures}" for name in lines[0][figures])])
    gpu_common.write(options, results)
    print_bars(results)


def scaled(samples: dict[str, list[float]], factor: float) -> dict[str, list[float]]:
    return {name: [value * factor for value in values] for name, values in samples.items()}


if __name__ == "__main__":
    main()

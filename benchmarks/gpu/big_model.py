"""A model far larger than the card that was never whole anywhere: Qwen3-30B-A3B in random weights.

Its checkpoint is real but for the experts, whose file is a hole: it has the right header and size
and no bytes on the disk. Every expert is a window into one pool of random values, each window a
little further on, so that all experts differ and none costs the time of making it. The windows go
straight into the store; `from_pretrained` then finds a complete store of this checkpoint and never
reads the hole. `resident_model` copies the same windows into an unmodified model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from bars import common
from random_model import DOWN_SCALE, EMBEDDING_STD, Shape
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.initialization import no_init_weights

from tiered_mem.catalogue import ALIGNMENT
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.pack import pack

# 48 layers of 128 experts of 9.4 MB: 58 GB, and 3 GB of other weights.
FULL = Shape("qwen3-30b-a3b", 48, 128, 8, 2048, 768, 32, 4, 151936)
SMOKE = Shape("qwen3-moe-gpu-smoke", 4, 16, 3, 64, 32, 4, 2, 256)
HEAD_DIM = 128  # of Qwen3-30B-A3B: more than hidden / heads

_STEP = 64  # elements from one expert's window to the next
_EXPERT_STD = 0.02
_SEED = 0
_DISK_ROOM = 4 << 30
_HOST_ROOM = 16 << 30
_CARD_ROOM = 8 << 30  # non-expert weights, activations and torch's own, beside all experts
_TRANSACTION_NBYTES = 1 << 30
_LMDB_RATE = 1e9  # bytes a second into its pages, before they are written (measured)


@dataclass(frozen=True)
class BigModel:
    """Where it is: its checkpoint (a hole for experts), its store, its shape."""

    shape: Shape
    checkpoint: Path
    store: Path

    @property
    def block_nbytes(self) -> int:
        return self.shape.expert_nbytes

    @property
    def store_file(self) -> Path:
        return self.store / "data.mdb"

    @property
    def non_expert_nbytes(self) -> int:
        return _non_experts(self.checkpoint).stat().st_size

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.shape) | {
            "experts_nbytes": self.shape.experts_nbytes,
            "non_expert_nbytes": self.non_expert_nbytes,
            "experts_are": "windows into one pool of random values",
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: as many as fit")
    parser.add_argument(
        "--make-seconds", type=int, default=0, help="fewer layers, if writing all takes longer"
    )


def big_model(options: argparse.Namespace) -> BigModel:
    """Return the model in the folder `options.dir`, made now or by an earlier run.

    It has `options.layers` layers, or as many as disk, host memory and card hold. A store that was
    left half-written is gone on with; one of other sizes is replaced.
    """
    folder, layers = options.dir, options.layers
    mark = folder / "big-model.json"
    shape = SMOKE if options.smoke else FULL
    if layers:
        shape = replace(shape, num_layers=layers)
    if not (mark.exists() and _same(mark, shape, layers)):
        shutil.rmtree(folder / shape.name, ignore_errors=True)
        if not (layers or options.smoke):
            shape = replace(shape, num_layers=_layers_that_fit(shape, options))
        (folder / shape.name).mkdir(parents=True)
        _write_checkpoint(shape, folder / shape.name)
        mark.write_text(json.dumps(asdict(shape)))
    shape = Shape(**json.loads(mark.read_text()))
    checkpoint = folder / shape.name
    with _Windowed.open(checkpoint) as source:
        pack(source, checkpoint / "store", transaction_nbytes=_TRANSACTION_NBYTES)
    return BigModel(shape, checkpoint, checkpoint / "store")


def resident_model(big: BigModel, device: torch.device) -> Qwen3MoeForCausalLM:
    """Return the unmodified transformers model with all weights on `device`."""
    config = AutoConfig.from_pretrained(big.checkpoint)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights(), torch.device(device):
            model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.load_state_dict(load_file(_non_experts(big.checkpoint)), strict=False)
    layout = ExpertLayout.of_module(model.model.layers[0].mlp.experts)
    windows = _Windows(layout, big.shape.num_layers, device)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            for name, parameter in layer.mlp.experts.named_parameters():
                parameter.copy_(windows.of_layer(name, number))
    return model.eval()


class _Windows:
    """The weights of every expert, as views into a pool of random values for each tensor."""

    def __init__(self, layout: ExpertLayout, num_layers: int, device: torch.device | str) -> None:
        self._num_experts = layout.num_experts
        self._pools: dict[str, torch.Tensor] = {}
        self._sizes = {field.name: field.shape for field in layout.fields}
        generator = torch.Generator().manual_seed(_SEED)
        for field in layout.fields:
            numel = math.prod(field.shape) + num_layers * self._num_experts * _STEP
            pool = torch.randn(numel, generator=generator) * _EXPERT_STD
            pool *= DOWN_SCALE if field.name == "down_proj" else 1
            self._pools[field.name] = pool.to(device, field.dtype)

    def of_layer(self, name: str, layer: int) -> torch.Tensor:
        """Return a view [num_experts, ...]: a whole layer that takes no memory."""
        size = self._sizes[name]
        inner = torch.empty(size, device="meta").stride()
        first = layer * self._num_experts * _STEP
        return self._pools[name].as_strided((self._num_experts, *size), (_STEP, *inner), first)


class _Windowed(Checkpoint):
    """The checkpoint with a hole, its experts read from the windows instead."""

    _windows: _Windows | None = None

    @contextmanager
    def reader(self, layer: int) -> Iterator[Any]:
        if self._windows is None:
            self._windows = _Windows(self.layouts[0], self.num_layers, "cpu")
        yield _WindowReader(self.layouts[layer], self._windows, layer)


@dataclass(frozen=True)
class _WindowReader:
    layout: ExpertLayout
    windows: _Windows
    layer: int

    def read(self, index: int, out: torch.Tensor) -> None:
        self.layout.clear_padding(out)
        for name, view in self.layout.views(out).items():
            view.copy_(self.windows.of_layer(name, self.layer)[index])


def _same(mark: Path, shape: Shape, layers: int) -> bool:
    made = json.loads(mark.read_text())
    wanted = asdict(shape) | ({} if layers else {"num_layers": made["num_layers"]})
    return bool(made == wanted)


def _layers_that_fit(shape: Shape, options: argparse.Namespace) -> int:
    """Return how many layers of experts each of disk, host memory and card hold, the least.

    And how many can be written in `options.make_seconds`, if that is given.
    """
    pages = -(-shape.expert_nbytes // ALIGNMENT) + 1
    layer_nbytes = shape.num_experts * pages * ALIGNMENT
    rooms = {"disk": psutil.disk_usage(str(options.dir)).free - _DISK_ROOM}
    rooms["host memory"] = psutil.virtual_memory().available - _HOST_ROOM
    if options.device.type == "cuda":
        rooms["card"] = torch.cuda.mem_get_info(options.device)[1] - _CARD_ROOM
    if options.make_seconds:
        rooms["time to write"] = int(options.make_seconds * _write_rate(options.dir))
    narrowest = min(rooms, key=rooms.__getitem__)
    fitting = rooms[narrowest] // layer_nbytes
    if fitting < 1:
        raise SystemExit(f"not one layer of {layer_nbytes} bytes fits the {narrowest}: {rooms}")
    if fitting < shape.num_layers:
        print(f"{fitting} of {shape.num_layers} layers: the {narrowest} allows no more")
    return int(min(shape.num_layers, fitting))


def _write_rate(folder: Path) -> float:
    """Return bytes per second at which a store is written: into LMDB's pages, then to the disk."""
    block = torch.randint(256, (1 << 28,), dtype=torch.uint8).numpy().tobytes()
    path = folder / "write-rate"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(4):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return 1 / (seconds / (4 * len(block)) + 1 / _LMDB_RATE)


def _config(shape: Shape) -> Qwen3MoeConfig:
    config = shape.config()
    config.head_dim = HEAD_DIM
    config.max_position_embeddings = 40960
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.dtype = torch.bfloat16
    return config


def _non_experts(checkpoint: Path) -> Path:
    return checkpoint / "model-00001-of-00002.safetensors"


def _write_checkpoint(shape: Shape, folder: Path) -> None:
    config = _config(shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        meta = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(_SEED)
    tensors, holes = {}, {}
    for name, parameter in meta.named_parameters():
        if ".experts." in name:
            holes[name] = list(parameter.shape)
        elif name.endswith("norm.weight"):
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            std = EMBEDDING_STD if "embed_tokens" in name else config.initializer_range
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16)
            tensors[name] = values.mul_(std)
    file = _non_experts(folder)
    save_file(tensors, file, metadata={"format": "pt"})
    hole = folder / "model-00002-of-00002.safetensors"
    _write_hole(hole, holes)
    weight_map = dict.fromkeys(tensors, file.name) | dict.fromkeys(holes, hole.name)
    total = file.stat().st_size + hole.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_hole(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file of bfloat16 zeros that takes no room on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    with path.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + offset)


def main() -> None:
    """Make the model ahead of the benchmarks that use it."""
    import gpu_common

    parser = gpu_common.parser(__doc__.splitlines()[0], "big_model")
    add_arguments(parser)
    options = gpu_common.parse(parser)
    started = time.perf_counter()
    big = big_model(options)
    seconds = time.perf_counter() - started
    results = gpu_common.describe(options) | {"model": big.as_dict(), "seconds": seconds}
    gpu_common.write(options, results)
    rate = big.shape.experts_nbytes / seconds / 1e9
    common.print_table(
        [[big.shape.name, big.shape.num_layers, big.shape.experts_nbytes / 1e9, seconds, rate]],
        ["model", "layers", "GB of experts", "s", "GB/s"],
    )


if __name__ == "__main__":
    main()

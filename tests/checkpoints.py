"""Checkpoints that `save_pretrained` doesn't write by itself, and what is compared about them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.hollow import find_experts
from tiered_mem.hf.layout import ExpertLayout


def save(name: str, folder: Path, **save_kwargs: Any) -> Path:
    """A tiny random checkpoint of a family."""
    model, _ = families.build(name)
    model.save_pretrained(folder, **save_kwargs)
    return folder


def expert_blocks(model: PreTrainedModel) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(layer, expert, its block) of a model that has its experts in memory."""
    for _, module, layer in find_experts(model):
        layout = ExpertLayout.of_module(module)
        for index in range(layout.num_experts):
            block = torch.empty(layout.nbytes, dtype=torch.uint8)
            layout.copy_expert(module, index, block)
            yield layer, index, block


def assert_same_experts(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """The checkpoint reads, byte for byte, the experts of the model that transformers loaded."""
    layers = set()
    for layer, index, expected in expert_blocks(model):
        layers.add(layer)
        block = torch.full((checkpoint.layouts[layer].nbytes,), 0xAA, dtype=torch.uint8)
        checkpoint.read_expert(layer, index, block)
        assert torch.equal(block, expected), f"expert {index} of {checkpoint.names[layer]}"
    assert layers == set(range(checkpoint.num_layers))


def edit_tensors(folder: Path, edit: Any) -> None:
    """Rewrite the only safetensors file of a checkpoint: `edit(tensors)` returns the new ones."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def drop_tensors(folder: Path, part: str) -> None:
    """Leave out the tensors that have `part` in their key."""
    edit_tensors(folder, lambda t: {key: value for key, value in t.items() if part not in key})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def quantise_fp8(folder: Path, block: int = 8) -> None:
    """Turn a checkpoint of per-expert bf16 matrices into fp8 ones with a scale for each tile."""

    def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for key, tensor in tensors.items():
            if tensor.dim() != 2 or not (".experts." in key or "self_attn" in key):
                out[key] = tensor.bfloat16()
                continue
            rows, columns = tensor.shape
            tiles = tensor.float().view(rows // block, block, columns // block, block)
            scale = tiles.abs().amax((1, 3)) / 448
            quantised = (tiles / scale[:, None, :, None]).view(rows, columns)
            out[key] = quantised.to(torch.float8_e4m3fn)
            out[f"{key}_scale_inv"] = scale
        return out

    edit_tensors(folder, quantise)
    quantization = {
        "quant_method": "fp8",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    }
    edit_config(folder, dtype="bfloat16", quantization_config=quantization)


def quantise_mxfp4(folder: Path) -> None:
    """Turn a gpt_oss checkpoint's experts into random 4-bit blocks with a scale for 32 values."""

    def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for key, tensor in tensors.items():
            if not key.endswith(("gate_up_proj", "down_proj")):
                out[key] = tensor.bfloat16()
                continue
            experts, rows, columns = tensor.shape
            shape = (experts, columns, rows // 32)
            out[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            out[f"{key}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
        return out

    edit_tensors(folder, quantise)
    kept = ["lm_head", "router", "self_attn", "embed_tokens"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    edit_config(folder, dtype="bfloat16", quantization_config=quantization)


def memory_nbytes(field: str) -> int:
    """What /proc/self/status says: VmHWM, the largest resident size so far, RssAnon, ..."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status).group(1))  # type: ignore[union-attr]

"""Experts read from a checkpoint are, byte for byte, those that transformers loads."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
import transformers
from checkpoints import assert_same_experts
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tiered_mem.errors import CheckpointError, UnsupportedModelError
from tiered_mem.hf import tensor_file
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.tensor_file import TensorFile

TAKING_PART = [name for name in families.families() if name not in families.LEFT_OUT]


@pytest.mark.parametrize("name", TAKING_PART)
def test_both_ways_of_saving(name: str, tmp_path: Path) -> None:
    model, _ = families.build(name)
    for folder in families.save_both_ways(model, tmp_path):
        with Checkpoint.open(folder, model_class=type(model)) as checkpoint:
            assert_same_experts(checkpoint, type(model).from_pretrained(folder))


# Per expert, fused, transposed with biases, interleaved, and one whose layers convert as a whole.
@pytest.mark.parametrize(
    "name", ["qwen3_moe", "granitemoe", "gpt_oss", "inkling2", "ernie4_5_vl_moe"]
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "float16"])
def test_shards_and_dtypes(name: str, dtype: Any, tmp_path: Path) -> None:
    model, _ = families.build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with Checkpoint.open(tmp_path, model_class=type(model), dtype=dtype) as checkpoint:
        stock = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert checkpoint.dtype == stock.dtype
        assert_same_experts(checkpoint, stock)


def test_the_dtype_of_the_config_counts(tmp_path: Path) -> None:
    model, _ = families.build("mixtral")
    model.bfloat16().save_pretrained(tmp_path)
    for dtype in (None, "auto", torch.bfloat16):
        with Checkpoint.open(tmp_path, dtype=dtype) as checkpoint:
            assert checkpoint.dtype == torch.bfloat16
            assert {f.dtype for f in checkpoint.layouts[0].fields} == {torch.bfloat16}


def test_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    model, _ = families.build("mixtral")
    model.model.save_pretrained(tmp_path)
    assert not any(key.startswith("model.") for key in load_file(tmp_path / "model.safetensors"))
    with Checkpoint.open(tmp_path, model_class=type(model)) as checkpoint:
        assert_same_experts(checkpoint, model)


def test_a_hub_id_in_the_cache(tmp_path: Path) -> None:
    """Offline, by name: what transformers finds in its cache is what is read."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    folder = checkpoints.save("mixtral", repository / "snapshots" / commit, max_shard_size="20KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with Checkpoint.open("someone/tiny", cache_dir=tmp_path, local_files_only=True) as checkpoint:
        assert checkpoint.name == "someone/tiny"
        assert_same_experts(checkpoint, stock)
    with pytest.raises(CheckpointError, match="someone/other"):
        Checkpoint.open("someone/other", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_fp8_is_dequantised_as_transformers_does(name: str, dtype: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    checkpoints.quantise_fp8(checkpoints.save(name, tmp_path))
    stock = families.model_class(name).from_pretrained(tmp_path, dtype=dtype)
    with Checkpoint.open(tmp_path, dequantise=True, dtype=dtype) as checkpoint:
        assert_same_experts(checkpoint, stock)
        assert not checkpoint.reads_whole(0)


def test_mxfp4_is_dequantised_as_transformers_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    config = families.tiny_config("gpt_oss")
    config.hidden_size, config.intermediate_size = 64, 32
    families.model_class("gpt_oss")._from_config(config).save_pretrained(tmp_path)
    checkpoints.quantise_mxfp4(tmp_path)
    stock = families.model_class("gpt_oss").from_pretrained(tmp_path)
    with Checkpoint.open(tmp_path, dequantise=True) as checkpoint:
        assert_same_experts(checkpoint, stock)
        assert not checkpoint.reads_whole(0)


@pytest.mark.parametrize("original", [True, False])
def test_only_the_bytes_of_the_expert_are_read(
    original: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(
        checkpoints.save("qwen3_moe", tmp_path, save_original_format=original)
    )
    layout = checkpoint.layouts[1]
    read: list[int] = []
    read_into = TensorFile._read_into

    def count(self: TensorFile, out: memoryview, offset: int) -> None:
        read.append(len(out))
        read_into(self, out, offset)

    monkeypatch.setattr(TensorFile, "_read_into", count)
    checkpoint.read_expert(1, 3, torch.empty(layout.nbytes, dtype=torch.uint8))
    assert sum(read) == layout.nbytes


def test_experts_of_two_kinds_from_one_list_need_the_whole_layer(tmp_path: Path) -> None:
    name = "ernie4_5_vl_moe"
    checkpoint = Checkpoint.open(
        checkpoints.save(name, tmp_path), model_class=families.model_class(name)
    )
    assert all(checkpoint.reads_whole(layer) for layer in range(checkpoint.num_layers))


def test_tied_experts_are_one_layer(tmp_path: Path) -> None:
    name = "diffusion_gemma"
    checkpoint = Checkpoint.open(
        checkpoints.save(name, tmp_path), model_class=families.model_class(name)
    )
    assert len(checkpoint.layer_of) == 2 * checkpoint.num_layers


def test_wrong_indices_and_buffers_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path))
    nbytes = checkpoint.layouts[0].nbytes
    for index in (-1, checkpoint.num_experts(0)):
        with pytest.raises(IndexError, match="expert"):
            checkpoint.read_expert(0, index, torch.empty(nbytes, dtype=torch.uint8))
    with pytest.raises(ValueError, match=str(nbytes)):
        checkpoint.read_expert(0, 0, torch.empty(nbytes - 1, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["qwen3_moe", "ernie4_5_vl_moe"])
def test_experts_are_read_by_several_threads(name: str, tmp_path: Path) -> None:
    model, _ = families.build(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, model_class=type(model))
    expected = list(checkpoints.expert_blocks(model))

    def reads_right(expert: tuple[int, int, torch.Tensor]) -> bool:
        layer, index, block = expert
        out = torch.empty_like(block)
        checkpoint.read_expert(layer, index, out)
        return torch.equal(out, block)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(reads_right, expected * 4))


# --- fingerprint ---


def test_the_fingerprint_names_the_weights_not_the_place(tmp_path: Path) -> None:
    first = checkpoints.save("mixtral", tmp_path / "first")
    moved = shutil.copytree(first, tmp_path / "moved")
    other = shutil.copytree(first, tmp_path / "other")
    checkpoints.edit_tensors(other, lambda tensors: {k: t + 1 for k, t in tensors.items()})

    fingerprint = Checkpoint.open(first).fingerprint
    assert Checkpoint.open(moved).fingerprint == fingerprint
    assert Checkpoint.open(first, dtype=torch.bfloat16).fingerprint == fingerprint
    assert Checkpoint.open(other).fingerprint != fingerprint  # equal headers, other weights


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # a tensor per expert; one for all
def test_the_fingerprint_tells_when_a_single_expert_changed(name: str, tmp_path: Path) -> None:
    folder = checkpoints.save(name, tmp_path)
    opened = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    seen = {opened.fingerprint}
    changed = random.Random(0).sample(sorted(opened.expert_keys), 6)
    for key in changed:
        piece = tensors[key][-1] if name == "gpt_oss" else tensors[key]
        piece += 1
        save_file(tensors, path, metadata={"format": "pt"})
        seen.add(Checkpoint.open(folder).fingerprint)
        piece -= 1
    assert len(seen) == len(changed) + 1


def test_the_fingerprint_reads_no_more_than_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "_MAX_SAMPLES", 5)
    reads: list[int] = []
    read_into = tensor_file.TensorFile._read_into

    def count(self: tensor_file.TensorFile, out: memoryview, offset: int) -> None:
        reads.append(len(out))
        read_into(self, out, offset)

    monkeypatch.setattr(tensor_file.TensorFile, "_read_into", count)
    Checkpoint.open(checkpoints.save("qwen3_moe", tmp_path))
    assert 3 <= len(reads) <= 5 and max(reads) <= 4096


# --- layout ---


def test_a_layout_takes_what_is_per_expert_and_nothing_else() -> None:
    module = nn.Module()
    module.num_experts = 4
    module.weight = nn.Parameter(torch.arange(4 * 6, dtype=torch.uint8).view(4, 6), False)
    module.register_buffer("scale", torch.arange(4).to(torch.float8_e8m0fnu))
    module.register_buffer("scratch", torch.zeros(4), persistent=False)
    module.shared = nn.Parameter(torch.zeros(3, 4))
    module.norm = nn.LayerNorm(4)
    module.register_parameter("bias", None)
    layout = ExpertLayout.of_module(module)
    assert [(f.name, f.shape) for f in layout.fields] == [("weight", (6,)), ("scale", ())]
    block = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    layout.copy_expert(module, 2, block)
    assert block.tolist() == [*range(12, 18), *[0] * 58, int(module.scale.view(torch.uint8)[2])]


def test_views_are_aligned_and_share_the_block() -> None:
    layout = ExpertLayout.build(4, {"a": ((3,), torch.float32), "b": ((2, 5), torch.bfloat16)})
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(block)
    views["b"].fill_(1)
    assert views["a"].shape == (3,) and views["b"].shape == (2, 5)
    assert all(field.offset % 64 == 0 for field in layout.fields)
    assert torch.equal(block[64:].view(torch.bfloat16), torch.ones(10, dtype=torch.bfloat16))
    assert layout.nbytes == 64 + 20


# --- refusals ---

OUTSIDE: dict[str, dict[str, Any]] = {
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    "llama4_text": {"intermediate_size_mlp": 16, "num_local_experts": 4, "head_dim": 8},
    "longcat_flash": {"num_layers": 1, "n_routed_experts": 4, "ffn_hidden_size": 16},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "switch_transformers": {"d_model": 32, "num_experts": 4, "d_ff": 16, "d_kv": 8},
    "nllb-moe": {"d_model": 32, "num_experts": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
}


def unreadable(folder: Path, model_type: str, **values: Any) -> Path:
    """A checkpoint that has a config and weights which nobody could read."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.AutoConfig.for_model(
        model_type, **(size | {"intermediate_size": 16} | values)
    )
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"never read")
    return folder


@pytest.mark.parametrize("model_type", OUTSIDE)
def test_experts_outside_the_interface_are_refused_unread(model_type: str, tmp_path: Path) -> None:
    folder = unreadable(tmp_path, model_type, **OUTSIDE[model_type])
    seq2seq = model_type in ("switch_transformers", "nllb-moe")
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    with pytest.raises(UnsupportedModelError, match=f"{model_type}.*outside.*experts interface"):
        Checkpoint.open(folder, model_class=auto)


def test_a_dense_model_is_told_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"llama.*not a mixture.*device_map"):
        Checkpoint.open(unreadable(tmp_path, "llama"))


def test_quantisation_whose_package_is_missing(tmp_path: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 4}
    checkpoints.edit_config(checkpoints.save("mixtral", tmp_path), quantization_config=quantization)
    with pytest.raises(UnsupportedModelError, match=f"{tmp_path.name} here.*install"):
        Checkpoint.open(tmp_path)


# --- broken checkpoints ---


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Checkpoint.open(tmp_path / "nowhere", local_files_only=True)


def test_bin_files_say_how_to_convert(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    path = checkpoints.save("mixtral", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole"):
        Checkpoint.open(tmp_path)


def test_a_file_truncated_after_opening(tmp_path: Path) -> None:
    path = checkpoints.save("mixtral", tmp_path) / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="not a whole"):
        for layer in range(checkpoint.num_layers):
            block = torch.empty(checkpoint.layouts[layer].nbytes, dtype=torch.uint8)
            checkpoint.read_expert(layer, 0, block)


@pytest.mark.parametrize("header", [b"[]", b"{x", b'{"a": 1}'])
def test_a_file_of_something_else(header: bytes, tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    length = len(header).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(length + header)
    with pytest.raises(CheckpointError, match="not a whole"):
        Checkpoint.open(tmp_path)


def test_a_broken_file_beside_a_config_without_dtype(tmp_path: Path) -> None:
    checkpoints.edit_config(checkpoints.save("mixtral", tmp_path), dtype=None)
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=tmp_path.name):
        Checkpoint.open(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint.open(tmp_path)


def test_an_index_that_names_a_tensor_no_shard_has(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("where", ["one", "all"])
def test_a_tensor_of_another_shape(original: bool, where: str, tmp_path: Path) -> None:
    checkpoints.save("qwen3_moe", tmp_path, save_original_format=original)

    def shorten(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        keys = [key for key in tensors if "experts" in key and "down_proj" in key]
        for key in keys[:1] if where == "one" else keys:
            tensors[key] = tensors[key][..., :-1].contiguous()
        return tensors

    checkpoints.edit_tensors(tmp_path, shorten)
    with pytest.raises(CheckpointError, match=r"down_proj.*shape"):
        Checkpoint.open(tmp_path)


def test_a_missing_expert(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    checkpoints.drop_tensors(tmp_path, "experts.3.w1")
    with pytest.raises(CheckpointError, match="incomplete"):
        Checkpoint.open(tmp_path)


def test_a_missing_layer(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    checkpoints.drop_tensors(tmp_path, "layers.1")
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1"):
        Checkpoint.open(tmp_path)


def test_a_config_of_other_sizes(tmp_path: Path) -> None:
    checkpoints.edit_config(checkpoints.save("mixtral", tmp_path), num_local_experts=4)
    with pytest.raises(CheckpointError, match=r"8 tensors.*4 experts"):
        Checkpoint.open(tmp_path)

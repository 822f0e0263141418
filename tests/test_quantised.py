"""Experts that stay quantised in every tier compute what the dequantised model computes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapter
import checkpoints
import families
import pytest
import torch
from test_device_experts import pretending
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import tiered_mem
from tiered_mem.errors import CheckpointError, StoreMismatchError, UnsupportedModelError
from tiered_mem.hf import quantised
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.dequantise import FastFp8Dequantize, dequantise, fp4_table
from tiered_mem.hf.detect import require_experts
from tiered_mem.hf.device import Way
from tiered_mem.hf.pack import pack
from tiered_mem.hf.repair import repair
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store

pytest.importorskip("accelerate")

FP8 = ["qwen3_moe", "deepseek_v3", "mixtral"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(name: str, folder: Path, block: int = 8) -> Path:
    """A quantised checkpoint: gpt_oss in mxfp4, any other in fp8."""
    if name != "gpt_oss":
        checkpoints.quantise_fp8(checkpoints.save(name, folder), block)
        return folder
    config = families.tiny_config(name)
    config.hidden_size, config.intermediate_size = 64, 32
    families.model_class(name)._from_config(config).save_pretrained(folder)
    checkpoints.quantise_mxfp4(folder)
    return folder


def asking(name: str) -> Any:
    config = Mxfp4Config if name == "gpt_oss" else FineGrainedFP8Config
    return config(dequantize=True)


@pytest.fixture(autouse=True)
def tell_again() -> Iterator[None]:
    quantised._tell.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="experts stay quantised")
        yield


# --- what is computed ---


# transformers 5.23 can't run a dequantised fp8 model in another dtype: only some weights are cast.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in FP8), *(("gpt_oss", d) for d in DTYPES)],
)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_logits_and_tokens_are_those_of_the_dequantised_model(
    name: str, dtype: torch.dtype, experts: str, tmp_path: Path
) -> None:
    make(name, tmp_path)
    stock = families.model_class(name).from_pretrained(
        tmp_path, dtype=dtype, experts_implementation=experts, quantization_config=asking(name)
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        slot = checkpoint.layouts[0].slot_nbytes
    model = tiered_mem.from_pretrained(
        tmp_path, hbm=3 * slot, dram=3 * slot, dtype=dtype, experts_implementation=experts
    )
    assert model.tiered_mem.layouts[0].quantised
    inputs = adapter.padded_batch()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(adapter.generate(model, inputs), adapter.generate(stock, inputs))
    assert model.tiered_mem.stats().num_nvme_reads > 0
    unwrapped = model.tiered_mem.unwrap()
    expected = stock.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in unwrapped.state_dict().items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("way", list(Way))
def test_every_way_of_a_device_computes_from_quantised_blocks(
    name: str, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(name, tmp_path)
    experts = "eager" if way is Way.EAGER else "grouped_mm"
    stock = families.model_class(name).from_pretrained(tmp_path, experts_implementation=experts)
    with Checkpoint.open(tmp_path) as checkpoint:
        slot = checkpoint.layouts[0].slot_nbytes
    with pretending(monkeypatch, way):
        model = tiered_mem.from_pretrained(
            tmp_path, hbm=8 * slot, dram=3 * slot, experts_implementation=experts
        )
        inputs = adapter.padded_batch()
        with torch.no_grad():
            ours, theirs = model(**inputs).logits, stock(**inputs).logits
        # A batched matmul sums in another order than the stock function on this machine.
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
        assert way is Way.BATCHED or torch.equal(ours, theirs)
        model.tiered_mem.close()


def test_every_fp8_code_and_kind_of_scale_as_transformers() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(8, 4)
    scales = {
        "fp32": torch.rand(4, 16) * 3,
        "bf16": torch.rand(4, 16).bfloat16(),
        "e8m0": torch.randint(90, 150, (4, 16), dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "exponents": torch.randint(90, 150, (4, 16), dtype=torch.uint8),
        "one": torch.rand(1, 1),
    }
    for values in (
        codes.view(torch.float8_e4m3fn),
        codes.view(torch.float8_e5m2),
        codes.view(torch.int8),
    ):
        for kind, scale in scales.items():
            for dtype in DTYPES:
                expected = Fp8Dequantize(None)._dequantize_one(values, scale, dtype)
                made = FastFp8Dequantize(None)._dequantize_one(values, scale, dtype)
                same = torch.equal(made.nan_to_num(), expected.nan_to_num())
                assert same and made.dtype == dtype, (values.dtype, kind, dtype)
                assert torch.equal(made.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp4_code_and_exponent_as_transformers(dtype: torch.dtype) -> None:
    exponents = torch.arange(255, dtype=torch.uint8).repeat_interleave(2).view(1, 255, 2)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)[torch.randint(16, (1, 255, 2))]
    expected = convert_moe_packed_tensors(blocks, exponents, dtype=dtype)
    made = torch.empty_like(expected)
    powers = torch.pow(2.0, exponents[0].int() - 127)
    dequantise(blocks[0].flatten(1), fp4_table(blocks.device), powers, made[0].T)
    assert torch.equal(made.nan_to_num(), expected.nan_to_num())


def test_rows_are_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40, 32).to(torch.float8_e4m3fn)
    scales = torch.rand(5, 4)
    convert = FastFp8Dequantize(None)._dequantize_one
    whole = convert(values, scales, torch.float32)
    monkeypatch.setattr("tiered_mem.hf.dequantise._CACHE_NBYTES", 2 * 8 * 32 * 4)  # 2 of 5
    assert torch.equal(
        FastFp8Dequantize(None)._dequantize_one(values, scales, torch.float32), whole
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_on_cuda_as_the_dequantised_model(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    options = {"dtype": torch.bfloat16, "device_map": "cuda"}
    stock = families.model_class(name).from_pretrained(
        tmp_path, quantization_config=asking(name), **options
    )
    model = tiered_mem.from_pretrained(tmp_path, hbm=1 << 20, dram=1 << 20, **options)
    inputs = {key: value.cuda() for key, value in adapter.prompt().items()}
    assert model.tiered_mem.layouts[0].quantised
    assert torch.equal(adapter.generate(model, inputs), adapter.generate(stock, inputs))
    model.tiered_mem.close()


# --- what is stored ---


@pytest.mark.parametrize("name", [*FP8, "gpt_oss"])
def test_blocks_are_the_bytes_of_the_file(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "model")
    with (
        Checkpoint.open(tmp_path / "model") as checkpoint,
        Checkpoint.open(tmp_path / "model", dequantise=True) as dequantised,
    ):
        stored, full = checkpoint.layouts[0], dequantised.layouts[0]
        in_file = {f.name: f.nbytes for f in stored.fields}
        values = sum(n for field, n in in_file.items() if field.endswith((".weight", "_blocks")))
        weights = sum(f.nbytes for f in full.fields if not f.name.endswith("_bias"))
        assert values * (4 if name == "gpt_oss" else 2) == weights
        assert not full.quantised and full.itemsize == 2
        report = pack(checkpoint, tmp_path / "store")
        assert report.nbytes == stored.num_experts * stored.nbytes * checkpoint.num_layers
        block = torch.empty(stored.nbytes, dtype=torch.uint8)
        with Store.open(tmp_path / "store") as store, store.snapshot() as snapshot:
            snapshot.read(BlockKey(Kind.EXPERT, 0, 3), block.numpy())
        views = stored.views(block)
        for recipe in checkpoint._layers[0].recipes:
            if recipe.target in checkpoint._layers[0].kept:
                for field, tensor in recipe.read_one(3, checkpoint._read).items():
                    assert torch.equal(views[field].view(torch.uint8), tensor.view(torch.uint8))


def test_scales_of_all_kinds_are_checked_against_the_block_size(tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path)

    def coarser(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A grid that divides the matrix, but into other blocks than the config's."""
        return {
            key: value[:1] if key.endswith("down_proj.weight_scale_inv") else value
            for key, value in tensors.items()
        }

    checkpoints.edit_tensors(tmp_path, coarser)
    with pytest.raises(CheckpointError, match=r"down_proj.*shape \[1, 2\].*weight_block_size"):
        Checkpoint.open(tmp_path)


def test_scales_of_one_expert_differ(tmp_path: Path) -> None:
    make("mixtral", tmp_path)

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = next(k for k in tensors if k.endswith("experts.2.w1.weight_scale_inv"))
        return tensors | {key: tensors[key][:1].clone()}

    checkpoints.edit_tensors(tmp_path, cut)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1.*scale_inv has shape \[1, 4\]"):
        Checkpoint.open(tmp_path)


def test_scales_missing_for_one_expert(tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    checkpoints.drop_tensors(tmp_path, "layers.0.block_sparse_moe.experts.2.w1.weight_scale_inv")
    with pytest.raises(CheckpointError, match=r"7 tensors like .*scale_inv for the 8 experts"):
        Checkpoint.open(tmp_path)


def test_mxfp4_scales_of_another_shape(tmp_path: Path) -> None:
    make("gpt_oss", tmp_path)

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v[:, :5].clone() if k.endswith("_scales") else v for k, v in tensors.items()}

    checkpoints.edit_tensors(tmp_path, cut)
    with pytest.raises(CheckpointError, match="_proj can't be converted"):
        Checkpoint.open(tmp_path)


def test_experts_of_two_formats(tmp_path: Path) -> None:
    make("mixtral", tmp_path)

    def mix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = next(k for k in tensors if k.endswith("experts.2.w1.weight"))
        return tensors | {key: tensors[key].float().bfloat16()}

    checkpoints.edit_tensors(tmp_path, mix)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.weight is BF16"):
        Checkpoint.open(tmp_path)


def test_what_is_not_quantised_is_stored_as_before(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    with Checkpoint.open(tmp_path) as one, Checkpoint.open(tmp_path, dequantise=True) as other:
        assert one.layouts == other.layouts
        assert not one.layouts[0].quantised


# --- the store ---


def contents(store: Path, key: BlockKey) -> tuple[dict[str, Any], torch.Tensor]:
    """The metadata of a store and one of its blocks."""
    with Store.open(store) as opened, opened.snapshot() as snapshot:
        block = torch.empty(snapshot.extent(key).nbytes, dtype=torch.uint8)
        snapshot.read(key, block.numpy())
        return opened.metadata, block


@pytest.mark.parametrize("dequantised", [False, True])
def test_repair_writes_blocks_in_the_format_they_had(dequantised: bool, tmp_path: Path) -> None:
    source, store = make("qwen3_moe", tmp_path / "model"), tmp_path / "store"
    with Checkpoint.open(source, dequantise=dequantised) as checkpoint:
        pack(checkpoint, store)
    key = BlockKey(Kind.EXPERT, 1, 2)
    before = contents(store, key)
    assert repair(store, source, [key]).num_packed == 1
    after = contents(store, key)
    assert after[0] == before[0] and after[0]["experts"]["dequantised"] is dequantised
    assert torch.equal(after[1], before[1])


def test_damaged_blocks_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    source, store = make("gpt_oss", tmp_path / "model"), tmp_path / "store"
    stock = families.model_class("gpt_oss").from_pretrained(source)
    with Checkpoint.open(source) as checkpoint:
        pack(checkpoint, store)
    adapter.damage(store)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiered_mem.from_pretrained(source, hbm=1 << 20, dram=0, nvme=store)
        inputs = adapter.prompt()
        assert torch.equal(adapter.generate(model, inputs), adapter.generate(stock, inputs))
        model.tiered_mem.close()


def test_a_store_of_the_other_form_is_refused(tmp_path: Path) -> None:
    source, store = make("qwen3_moe", tmp_path / "model"), tmp_path / "store"
    with Checkpoint.open(source) as checkpoint:
        pack(checkpoint, store)
    with pytest.raises(StoreMismatchError, match="differ in layouts"):
        tiered_mem.from_pretrained(source, nvme=store, quantization_config=asking("qwen3_moe"))


# --- what is asked for ---


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_dequantize_converts_when_packing(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    stock = families.model_class(name).from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="experts stay quantised")
        model = tiered_mem.from_pretrained(
            tmp_path, hbm=1 << 20, dram=0, quantization_config=asking(name)
        )
    assert not model.tiered_mem.layouts[0].quantised
    inputs = adapter.prompt()
    assert torch.equal(adapter.generate(model, inputs), adapter.generate(stock, inputs))
    model.tiered_mem.close()


def test_conversions_are_told_once(tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            tiered_mem.from_pretrained(tmp_path, hbm=1 << 20, dram=0).tiered_mem.close()
    told = [str(w.message) for w in caught if "experts stay quantised" in str(w.message)]
    assert len(told) == 1
    assert "bfloat16" in told[0] and "dequantize=True" in told[0]


def test_other_quantisation_is_not_meddled_with() -> None:
    for method in ("gptq", "awq", "compressed-tensors", "bitsandbytes"):
        config = families.tiny_config("mixtral")
        config.quantization_config = {"quant_method": method}
        assert quantised.loading_options(config, {"revision": "main"}) == {"revision": "main"}


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_quantisation_says_what_is_missing(method: str, tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    checkpoints.edit_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=f"{tmp_path.name} here"):
        Checkpoint.open(tmp_path)


def test_experts_that_compute_quantised_are_refused() -> None:
    """What transformers builds on a GPU with `dequantize=False`."""

    class Mxfp4GptOssExperts(torch.nn.Module):
        num_experts = 4

    model, _ = families.build("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts()
    with pytest.raises(UnsupportedModelError, match="without quantization_config"):
        require_experts(model)

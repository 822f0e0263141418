"""Models loaded without their experts have everything else, and nothing of the experts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from tiered_mem.errors import CheckpointError, ConfigError, UnsupportedModelError
from tiered_mem.hf.detect import experts_interface
from tiered_mem.hf.hollow import find_experts, hollow_experts, hollow_model
from tiered_mem.hf.layout import ExpertLayout


def is_hollow(model: PreTrainedModel) -> bool:
    return not any(list(module.parameters()) for _, module, _ in find_experts(model))


def dense_model() -> PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**size, num_hidden_layers=1, vocab_size=64)
    return transformers.LlamaForCausalLM(config)


def assert_hollow_of(hollow: PreTrainedModel, stock: PreTrainedModel) -> None:
    """`hollow` is `stock` without its experts: same layouts, same other weights and buffers."""
    experts = find_experts(stock)
    assert [(name, layer) for name, _, layer in find_experts(hollow)] == [
        (name, layer) for name, _, layer in experts
    ]
    theirs = set()
    for name, module, _ in experts:
        emptied = hollow.get_submodule(name)
        layout = ExpertLayout.of_module(module)
        theirs |= {f"{name}.{field.name}" for field in layout.fields}
        assert emptied.tiered_layout == layout
        assert not list(emptied.parameters(recurse=False))
        assert all(getattr(emptied, field.name).is_meta for field in layout.fields)
    expected = {key: value for key, value in stock.state_dict().items() if key not in theirs}
    found = hollow.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    for key, buffer in hollow.named_buffers():
        assert torch.equal(buffer, stock.get_buffer(key)), key


# Per expert, fused, hash-routed, initialised from outside, tied, of two kinds, with n-gram tables.
@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "gpt_oss", "deepseek_v4", "qwen3_omni_moe", "diffusion_gemma"),
        *("ernie4_5_vl_moe", "qwen4_exp", "nemotron_h", "muse_spark"),
    ],
)
def test_all_but_the_experts_is_loaded(name: str, tmp_path: Path) -> None:
    model, _ = families.build(name)
    for folder in families.save_both_ways(model, tmp_path):
        stock, expected = type(model).from_pretrained(folder, output_loading_info=True)
        with hollow_experts() as loaded:
            hollow, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert_hollow_of(hollow, stock)
        assert info == expected  # no missing or unexpected key that the stock model hasn't
        [checkpoint] = loaded
        checkpoints.assert_same_experts(checkpoint, stock)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "float16"])
def test_dtypes_and_shards(dtype: Any, tmp_path: Path) -> None:
    checkpoints.save("qwen3_moe", tmp_path, max_shard_size="20KB")
    with hollow_experts():
        hollow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert hollow.dtype == stock.dtype
    assert_hollow_of(hollow, stock)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = families.tiny_config("qwen3_moe")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with hollow_experts():
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints.save("mixtral", tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with hollow_experts():
            AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == []


def test_experts_take_no_memory_and_are_not_read(tmp_path: Path) -> None:
    config = families.tiny_config("mixtral")
    config.hidden_size, config.intermediate_size, config.num_local_experts = 256, 1024, 16
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)  # 150 MB of experts
    AutoModelForCausalLM.from_pretrained(checkpoints.save("mixtral", tmp_path / "small"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = checkpoints.memory_nbytes("VmHWM")
    with hollow_experts() as loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    others = sum(parameter.nbytes for parameter in model.parameters())
    assert loaded[0].nbytes > 90 << 20
    # Twice: the file's pages and the copy made of them. Of the experts, not a tenth.
    assert checkpoints.memory_nbytes("VmHWM") - before < 2 * others + loaded[0].nbytes // 10


# --- scope ---


def test_outside_the_block_nothing_changes(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    seam = PreTrainedModel.__dict__["_load_pretrained_model"]
    with hollow_experts():
        assert is_hollow(AutoModelForCausalLM.from_pretrained(tmp_path))
        with hollow_experts() as inner:
            assert is_hollow(AutoModelForCausalLM.from_pretrained(tmp_path))
        assert len(inner) == 1
        assert is_hollow(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is seam
    assert not is_hollow(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_an_exception_puts_the_seam_back(tmp_path: Path) -> None:
    seam = PreTrainedModel.__dict__["_load_pretrained_model"]
    dense_model().save_pretrained(tmp_path)
    with hollow_experts():
        with pytest.raises(UnsupportedModelError, match="llama"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match="llama"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ZeroDivisionError), hollow_experts():
        raise ZeroDivisionError
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is seam
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0


def in_thread(function: Any, *args: Any) -> Any:
    """Run to the end in another thread and return the result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


def test_another_thread_loads_as_ever(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    with hollow_experts() as loaded:
        assert not is_hollow(in_thread(AutoModelForCausalLM.from_pretrained, tmp_path))
        assert is_hollow(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert len(loaded) == 1


def test_two_threads_at_once(tmp_path: Path) -> None:
    names = ["mixtral", "qwen3_moe"]
    dtypes = [torch.bfloat16, torch.float32]
    for name in names:
        checkpoints.save(name, tmp_path / name)
    models: dict[tuple[str, int], PreTrainedModel] = {}

    def load(name: str, dtype: torch.dtype) -> None:
        for turn in range(3):
            with hollow_experts():
                model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
            models[name, turn] = model

    threads = [threading.Thread(target=load, args=pair) for pair in zip(names, dtypes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 6
    for name, dtype in zip(names, dtypes, strict=True):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)
        for turn in range(3):
            assert_hollow_of(models[name, turn], stock)


# --- refusals ---


def test_broken_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    checkpoints.save("mixtral", tmp_path)
    checkpoints.drop_tensors(tmp_path, "experts.3")
    with hollow_experts(), pytest.raises(CheckpointError, match="incomplete"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict_is_refused(tmp_path: Path) -> None:
    model, _ = families.build("mixtral")
    with hollow_experts(), pytest.raises(CheckpointError, match=r"tiered_mem\.offload"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_weights_left_on_disk_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    checkpoints.save("mixtral", tmp_path / "model")
    device_map = {"model": "cpu", "lm_head": "disk"}
    with hollow_experts(), pytest.raises(ConfigError, match="disk"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
        )


def test_the_decorator_decides_not_the_name() -> None:
    modules = {
        "mixtral": transformers.models.mixtral.modeling_mixtral.MixtralExperts,
        "llama4": transformers.models.llama4.modeling_llama4.Llama4TextExperts,
    }
    found = {name: experts_interface(cls.__new__(cls)) is not None for name, cls in modules.items()}
    assert found == {"mixtral": True, "llama4": False}


def test_experts_with_kernels_of_their_own_are_refused() -> None:
    class Quantised(nn.Module):
        num_experts = 4

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    decorated = use_experts_implementation(Quantised, experts_interface=ExpertsInterface())
    model, _ = families.build("mixtral")
    model.model.layers[1].mlp.experts = decorated(model.config)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts.*dequantize=True"):
        next(hollow_model(model))


# --- a model in memory ---


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    yield
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["gpt_oss", "diffusion_gemma"])
def test_a_model_in_memory_gives_its_experts_and_drops_them(name: str, tmp_path: Path) -> None:
    families.build(name)[0].save_pretrained(tmp_path)
    model, stock = (families.model_class(name).from_pretrained(tmp_path) for _ in range(2))
    expected = {(layer, index): block for layer, index, block in checkpoints.expert_blocks(stock)}
    seen = set()
    for experts, layout in hollow_model(model):
        for index in range(layout.num_experts):
            block = torch.empty(layout.nbytes, dtype=torch.uint8)
            layout.copy_expert(experts.module, index, block)
            assert torch.equal(block, expected[experts.layer, index])
            seen.add((experts.layer, index))
    assert seen == expected.keys()
    assert_hollow_of(model, stock)


def test_a_caller_that_fails_keeps_its_model() -> None:
    model, _ = families.build("mixtral")
    with unchanged(model), pytest.raises(ZeroDivisionError):
        for _ in hollow_model(model):
            raise ZeroDivisionError


def test_a_dense_model_in_memory_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not a mixture"):
        next(hollow_model(dense_model()))

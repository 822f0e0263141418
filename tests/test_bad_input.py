"""Bad input and broken machines: an error that says what, where and what to do; nothing lost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from adapter import Saved, damage, generate, in_threads, open_files, padded_batch, prompt
from checkpoints import drop_tensors, edit_config, edit_tensors
from transformers import LlamaConfig, LlamaForCausalLM

import tiered_mem
from tiered_mem import environment
from tiered_mem.config import Budgets, BudgetWarning
from tiered_mem.errors import (
    BudgetError,
    CheckpointError,
    ChecksumError,
    ConfigError,
    DeviceError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
    StoreReadOnlyError,
    TransferError,
    UnsupportedModelError,
)
from tiered_mem.hf import pack as packing
from tiered_mem.hf.device import warn_of_unused_gpu
from tiered_mem.runtime import Runtime

pytestmark = pytest.mark.filterwarnings("ignore::tiered_mem.BudgetWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved.make("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def own(tmp_path: Path) -> Saved:
    """A checkpoint that the test may break."""
    return Saved.make("qwen3_moe", tmp_path / "checkpoint")


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eviction": "belady"}, "belady"),
        ({"eviction": "per-layer(nothing)"}, "nothing"),
        ({"prefetch": "crystal-ball"}, "crystal-ball"),
        ({"codec": "zip"}, "zip"),
        ({"hmb": "1GiB"}, "unknown option 'hmb'"),
        ({"experts_implementation": "nonsense"}, "nonsense"),
        ({"experts_implementation": {"text_config": "eager"}}, "text_config"),
        ({"hbm": "lots"}, "not a size: 'lots'"),
        ({"dram": "-5%"}, "not a size"),
        ({"dram": -5}, "negative"),
        ({"hbm": 2.5}, "not a size"),
    ],
    ids=str,
)
def test_options_that_dont_exist(
    saved: Saved, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        saved.load(nvme=tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()
    if "hmb" not in options and "experts_implementation" not in options:
        with pytest.raises(ConfigError, match=message):
            tiered_mem.offload(saved.model, **({"hbm": "50%"} | options))
        assert not hasattr(saved.model, "tiered_mem")


def test_options_that_a_given_runtime_has_already(saved: Saved) -> None:
    with Runtime(8 * saved.slot_nbytes) as runtime:
        for options in ({"hbm": "1MiB"}, {"dram": 0}, {"eviction": "lru"}):
            with pytest.raises(ConfigError, match="leave hbm, dram, eviction"):
                saved.load(runtime=runtime, **options)
        with pytest.raises(ConfigError, match="Runtime"):
            saved.load(runtime="mine")


# --- budgets ---


def test_budgets_that_cant_be_had(saved: Saved, tmp_path: Path) -> None:
    slot = saved.slot_nbytes
    for budgets, message in (
        ({"hbm": 0}, "above zero"),
        ({"hbm": "0%"}, "above zero"),
        ({"hbm": "1000TiB"}, "more than the"),
        ({"dram": "1000TiB"}, "more than the"),
        ({"hbm": 2 * slot - 1}, f"{2 * slot} bytes"),
    ):
        with pytest.raises(BudgetError, match=message):
            saved.load(nvme=tmp_path / "store", **budgets)
    assert not (tmp_path / "store").exists()
    with Runtime(slot) as runtime, pytest.raises(BudgetError, match=f"{2 * slot} bytes"):
        saved.load(runtime=runtime)
    with saved.on_tiers(hbm=2 * slot) as model:
        runtime = model.tiered_mem.runtime
        for hbm, message in ((0, "above zero"), (slot - 1, f"{slot} bytes"), (1 << 60, "more")):
            with pytest.raises(BudgetError, match=message):
                runtime.resize(hbm=hbm)
        assert runtime.budgets.hbm == 2 * slot
        assert torch.equal(generate(model, prompt()), generate(saved.model, prompt()))


@pytest.mark.filterwarnings("error::tiered_mem.BudgetWarning")
def test_a_budget_below_one_tokens_cycle_warns_with_the_size(saved: Saved) -> None:
    layers = 3
    cycle = layers * 2 * 8192  # a block of 3 * 32 * 16 floats takes a slot of two pages
    with pytest.warns(BudgetWarning, match=f"{cycle} bytes") as caught:
        saved.load(hbm=2 * saved.slot_nbytes).tiered_mem.close()
    assert caught[0].filename == str(Path(__file__).with_name("adapter.py"))  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error", BudgetWarning)
        saved.load(hbm=cycle).tiered_mem.close()


def test_auto_is_checked_again_once_the_weights_are_there(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = saved.slot_nbytes
    resolve, left = Budgets.resolve, iter([0, 0])

    def resolve_auto(hbm: Any, dram: Any, *, whole: int, **_: Any) -> Budgets:
        return resolve(next(left), 0, whole=whole) if hbm == "auto" else resolve(hbm, dram, whole=0)

    monkeypatch.setattr(Budgets, "resolve", resolve_auto)
    left = iter([24 * slot, 2 * slot - 1])
    with pytest.raises(BudgetError, match=f"{2 * slot} bytes"):
        saved.load(nvme=tmp_path / "store", hbm="auto")
    assert open_files(tmp_path) == []
    for budgets in ([24 * slot, 2 * slot], [3 * slot, 2 * slot]):
        left = iter(budgets)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BudgetWarning)
            saved.load(nvme=tmp_path / "store", hbm="auto").tiered_mem.close()
        assert len([w for w in caught if w.category is BudgetWarning]) == 1


# --- devices ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "nowhere"}, "is no device.*cuda:0"),
        ({"device_map": "meta"}, "experts can't be on 'meta'"),
        ({"device": "cpu", "device_map": "cpu"}, "both say"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "disk"),
        ({"device_map": {"lm_head": "cpu"}}, "names no device for model.layers.0"),
        ({"device_map": {"": "cpu", "model.layers.1": "meta"}}, "on several"),
    ],
    ids=str,
)
def test_devices_that_cant_be(
    saved: Saved, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        saved.load(nvme=tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "cuda:3"}, {"device_map": 0}])
def test_a_device_that_isnt_there(saved: Saved, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cuda|accelerator"):
        saved.load(nvme=tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_weights_on_the_host(saved: Saved) -> None:
    expected = generate(saved.model, prompt())
    ways: list[dict[str, Any]] = [{"device": "cpu"}, {"device": torch.device("cpu")}]
    ways += [{"device_map": place} for place in ("cpu", {"": "cpu"})]
    if not torch.accelerator.is_available():
        ways += [{"device": "auto"}, {"device_map": "auto"}]
    for options in ways:
        with saved.on_tiers(**options) as model:
            assert torch.equal(generate(model, prompt()), expected)


def test_a_model_on_two_devices(tmp_path: Path) -> None:
    model = families.build("qwen3_moe")[0]
    model.lm_head.to("meta")
    with pytest.raises(ConfigError, match=r"lm_head.weight is on 'meta'.*by .to"):
        tiered_mem.offload(model, hbm="50%", nvme=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_wrapped_model_stays_where_it_is(saved: Saved) -> None:
    inputs = prompt()
    with saved.on_tiers() as model:
        for move in (
            lambda: model.to("meta"),
            lambda: model.to(torch.empty(0, device="meta")),
            lambda: model.cuda(),
            lambda: model.cuda(1),
        ):
            with pytest.raises(ConfigError, match=r"experts are on cpu.*device=.*unwrap"):
                move()
        assert model.to("cpu") is model and model.cpu() is model
        assert torch.equal(generate(model, inputs), generate(saved.model, inputs))
        model.model.layers[1].to("meta")  # behind the model's back
        with pytest.raises((ConfigError, RuntimeError, NotImplementedError)):
            generate(model, inputs)
        experts = model.model.layers[0].mlp.experts
        ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
        with pytest.raises(ConfigError, match="hidden states are on meta"):
            experts(torch.zeros(1, 32, device="meta"), ids, torch.ones(1, 2, device="meta"))


def test_a_gpu_that_isnt_used_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    warn_of_unused_gpu.cache_clear()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    with pytest.warns(UserWarning, match="device='auto' would use cuda:0") as caught:
        for _ in range(2):
            warn_of_unused_gpu()
    assert len(caught) == 1
    warn_of_unused_gpu.cache_clear()


# --- checkpoints ---


def _truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size // 2)


def _reshape(path: Path) -> None:
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    edit_tensors(path, lambda tensors: tensors | {key: tensors[key][:, :-1].clone()})


def _name_a_missing_shard(path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: (path / "model.safetensors").unlink(),
        _truncate,
        _reshape,
        _name_a_missing_shard,
        lambda path: drop_tensors(path, "layers.1.mlp.experts.3."),
        lambda path: edit_config(path, num_local_experts=12),
        lambda path: (path / "config.json").unlink(),
        lambda path: (path / "config.json").write_text("{"),
    ],
    ids=["missing", "truncated", "reshaped", "shard", "expert", "sizes", "config", "json"],
)
def test_broken_checkpoints(own: Saved, break_it: Any, tmp_path: Path) -> None:
    break_it(own.path)
    with pytest.raises(CheckpointError) as caught:
        own.load(nvme=tmp_path / "store")
    assert str(own.path) in str(caught.value) or ".mlp.experts." in str(caught.value)
    del caught  # with the frames that opened the files
    assert not (tmp_path / "store").exists()
    assert open_files(tmp_path) == []


def test_a_model_without_experts(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "llama")
    for wrap in (
        lambda: tiered_mem.from_pretrained(tmp_path / "llama"),
        lambda: tiered_mem.offload(model),
    ):
        with pytest.raises(UnsupportedModelError, match=r"llama.*not a mixture.*plain from_pr"):
            wrap()


# --- stores ---


def test_a_store_of_another_checkpoint_or_dtype(saved: Saved, own: Saved, tmp_path: Path) -> None:
    store = tmp_path / "store"
    saved.load(nvme=store).tiered_mem.close()
    before = (store / "data.mdb").read_bytes()
    edit_tensors(own.path, lambda tensors: {k: v * 2 for k, v in tensors.items()})
    edit_config(own.path, rms_norm_eps=1e-5)
    with pytest.raises(StoreMismatchError, match="fingerprint"):
        own.load(nvme=store)
    with pytest.raises(StoreMismatchError, match="bfloat16"):
        saved.load(nvme=store, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="isn't empty"):
        tiered_mem.offload(own.model, hbm="50%", nvme=store)
    assert (store / "data.mdb").read_bytes() == before
    with saved.on_tiers(nvme=store) as model:
        assert torch.equal(generate(model, prompt()), generate(saved.model, prompt()))


def test_a_store_of_another_version(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(environment, "FORMAT_VERSION", 99)
        saved.load(nvme=tmp_path / "store").tiered_mem.close()
    with pytest.raises(StoreMismatchError, match="format 99"):
        saved.load(nvme=tmp_path / "store")
    assert open_files(tmp_path / "store") == []


def test_a_folder_of_something_else(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds no store"):
        saved.load(nvme=tmp_path)
    with pytest.raises(StoreError):
        saved.load(nvme=tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_too_small(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = packing.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreFullError, match="make room"):
        saved.load(nvme=tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A mounted tmpfs. Needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting isn't allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore:.*without O_DIRECT:RuntimeWarning")
def test_read_only_and_full_disks(saved: Saved, small_disk: Path) -> None:
    inputs, expected = prompt(), generate(saved.model, prompt())
    store = small_disk / "store"
    saved.load(nvme=store).tiered_mem.close()
    (small_disk / "filler").write_bytes(bytes((3 << 20) - 4096 - _used(small_disk)))
    model = families.build("qwen3_moe")[0]
    with pytest.raises(StoreFullError):
        tiered_mem.offload(model, hbm="50%", nvme=small_disk / "another")
    assert torch.equal(generate(model, inputs), expected)  # the model is as it was
    assert not (small_disk / "another").exists()
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with saved.on_tiers(nvme=store) as on_tiers:  # reading needs no more
        assert torch.equal(generate(on_tiers, inputs), expected)
    with pytest.raises(StoreReadOnlyError):
        saved.load(nvme=small_disk / "new")
    with pytest.raises(StoreReadOnlyError):
        tiered_mem.offload(model, hbm="50%", nvme=small_disk / "new")
    assert torch.equal(generate(model, inputs), expected)


def _used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


# --- what breaks under way ---


def test_flipped_bits_are_read_again_from_the_checkpoint(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = padded_batch()
    expected = generate(saved.model, inputs)
    for codec in ("none", "zstd"):
        store = tmp_path / codec
        saved.load(nvme=store, codec=codec).tiered_mem.close()
        assert damage(store, every=2) == 12
        with saved.on_tiers(nvme=store, dram_slots=0) as model, caplog.at_level(logging.WARNING):
            assert torch.equal(generate(model, inputs), expected)
            results = in_threads([lambda: generate(model, inputs)] * 3)
            assert all(torch.equal(tokens, expected) for tokens in results)
            stats = model.tiered_mem.stats()
        assert 0 < stats.num_repaired <= stats.num_failed  # a guess that failed is let go
        assert "verify --repair" in caplog.text
        unwrapped = saved.load(nvme=store).tiered_mem.unwrap()
        assert torch.equal(generate(unwrapped, inputs), expected)


def test_flipped_bits_of_a_model_that_has_no_checkpoint(tmp_path: Path) -> None:
    model, inputs = families.build("qwen3_moe")[0], prompt()
    expected = generate(model, inputs)
    tiered_mem.offload(model, hbm="50%", dram=0, nvme=tmp_path / "store")
    right = (tmp_path / "store" / "data.mdb").read_bytes()
    assert damage(tmp_path / "store") == 24
    for _ in range(2):
        with pytest.raises(ChecksumError, match=r"expert \d of layer 0"):
            generate(model, inputs)
    with pytest.raises(ChecksumError, match="of layer 0"):
        model.tiered_mem.unwrap()
    with (tmp_path / "store" / "data.mdb").open("r+b") as file:
        file.write(right)
    assert torch.equal(generate(model, inputs), expected)  # still wrapped, nothing lost
    assert torch.equal(generate(model.tiered_mem.unwrap(), inputs), expected)


def test_an_io_error_fails_the_token_and_nothing_else(saved: Saved, tmp_path: Path) -> None:
    other = Saved.make("mixtral", tmp_path / "mixtral")
    inputs = prompt()
    with Runtime(6 * max(saved.slot_nbytes, other.slot_nbytes)) as runtime:
        model = saved.load(runtime=runtime, nvme=tmp_path / "store")
        beside = other.load(runtime=runtime)
        assert torch.equal(generate(model, inputs), generate(saved.model, inputs))
        data = tmp_path / "store" / "data.mdb"
        whole = data.read_bytes()
        os.truncate(data, 0)
        failed = in_threads([lambda: generate(model, inputs)] * 3)
        assert all(isinstance(error, TransferError) for error in failed)
        assert all(str(data) in str(error) and "layer" in str(error) for error in failed)
        assert model.tiered_mem.stats().num_failed > 0
        assert torch.equal(generate(beside, inputs), generate(other.model, inputs))
        data.write_bytes(whole)  # the disk is back
        assert torch.equal(generate(model, inputs), generate(saved.model, inputs))
        os.truncate(data, len(whole) // 2)
        model.tiered_mem.close()
        assert torch.equal(generate(beside, inputs), generate(other.model, inputs))
        beside.tiered_mem.close()
        assert runtime.nbytes_used() == {"hbm": 0, "dram": 0}


def test_an_interrupted_pack_goes_on(saved: Saved, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        saved.load(nvme=tmp_path / "store", progress=stop)
    assert open_files(tmp_path) == []
    with saved.on_tiers(nvme=tmp_path / "store") as model:
        assert torch.equal(generate(model, prompt()), generate(saved.model, prompt()))
    model = families.build("qwen3_moe")[0]
    with pytest.raises(Enough):
        tiered_mem.offload(model, hbm="50%", nvme=tmp_path / "another", progress=stop)
    assert torch.equal(generate(model, prompt()), generate(saved.model, prompt()))
    assert not (tmp_path / "another").exists()

"""Models on tiers beside the unmodified model: every way of using them, and of leaving them."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from adapter import (
    Saved,
    generate,
    in_threads,
    num_threads,
    open_files,
    padded_batch,
    prompt,
    wait_until,
)
from checkpoints import memory_nbytes
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import tiered_mem
from tiered_mem.errors import (
    AlreadyWrappedError,
    ConfigError,
    RuntimeClosedError,
    StoreBusyError,
    TieredMemError,
    UnsupportedModelError,
)
from tiered_mem.hf import handle, wrap
from tiered_mem.hf.detect import find_experts
from tiered_mem.runtime import Runtime
from tiered_mem.space import Space
from tiered_mem.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::tiered_mem.BudgetWarning")

TINY_MOE = Path(__file__).parents[1] / "benchmarks" / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved.make("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary stores go in this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# --- the tokens are those of the unmodified model ---


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "without a KV cache": {"use_cache": False},
}


@pytest.mark.parametrize("prefetch", ["next-gate", "none"])
def test_every_way_to_generate_from_a_padded_batch(saved: Saved, prefetch: str) -> None:
    inputs = padded_batch()
    with saved.on_tiers(prefetch=prefetch) as model:
        for way, options in GENERATIONS.items():
            expected = generate(saved.model, inputs, **options)
            assert torch.equal(generate(model, inputs, **options), expected), way
        stats = model.tiered_mem.stats()
    assert stats.num_evictions > 0 and stats.num_failed == 0


@pytest.mark.parametrize("hbm_slots", [2, 5])
def test_eight_threads_at_once(saved: Saved, hbm_slots: int) -> None:
    prompts = [prompt(seed, 4 + seed) for seed in range(8)]
    expected = [generate(saved.model, inputs) for inputs in prompts]
    with saved.on_tiers(hbm_slots=hbm_slots) as model:
        calls = [lambda inputs=inputs: generate(model, inputs) for inputs in prompts]
        results = in_threads(calls)
        assert model.tiered_mem.stats().num_events > 8 * 6  # waves among them
    for result, tokens in zip(results, expected, strict=True):
        assert torch.equal(result, tokens)


def test_waves_of_one_slot_each(saved: Saved) -> None:
    inputs = prompt(num_tokens=1)
    with saved.on_tiers(hbm_slots=2, dram_slots=0) as model:
        model.tiered_mem.runtime.resize(hbm=saved.slot_nbytes)  # half of a token's experts
        results = in_threads([lambda: generate(model, inputs)] * 3)
    for tokens in results:
        assert torch.equal(tokens, generate(saved.model, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_trained_model_with_tied_weights(dtype: torch.dtype) -> None:
    stock = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=dtype).eval()
    inputs = {"input_ids": torch.arange(100, 124).view(2, 12)}
    expected = generate(stock, inputs, max_new_tokens=10)
    model = tiered_mem.from_pretrained(TINY_MOE, dtype=dtype, hbm="25%", dram="25%")
    with torch.no_grad():
        assert torch.equal(generate(model, inputs, max_new_tokens=10), expected)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    model.tiered_mem.close()


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_stay_in_memory(name: str, tmp_path: Path) -> None:
    saved = Saved.make(name, tmp_path)
    inputs = padded_batch()
    with saved.on_tiers() as model:
        shared = [key for key in model.state_dict() if "shared_expert" in key]
        assert shared and not any(".experts." in key for key in model.state_dict())
        for options in ({}, {"num_beams": 2}):
            tokens = generate(model, inputs, **options)
            assert torch.equal(tokens, generate(saved.model, inputs, **options))


def test_a_model_class_of_ones_own(saved: Saved) -> None:
    class Louder(Qwen3MoeForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 2
            return outputs

    inputs = prompt()
    with saved.on_tiers(model_class=Louder) as model:
        assert type(model) is Louder
        logits = families.logits(model, inputs)
    torch.testing.assert_close(logits, 2 * families.logits(saved.model, inputs))


def test_with_gradients_on_it_runs_forward_and_refuses_to_run_back(saved: Saved) -> None:
    inputs = prompt()
    with saved.on_tiers() as model:
        outputs = model(**inputs, labels=inputs["input_ids"])
        torch.testing.assert_close(outputs.logits.detach(), families.logits(saved.model, inputs))
        with pytest.raises(UnsupportedModelError, match="unwrap"):
            outputs.loss.backward()
        model.requires_grad_(False)
        model.model.layers[1].mlp.gate.weight.requires_grad_(True)
        with pytest.raises(UnsupportedModelError, match="trained"):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_no_tokens_and_no_experts(saved: Saved) -> None:
    with saved.on_tiers() as model:
        _, experts, _ = find_experts(model)[0]
        no_tokens = experts(
            torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)
        )
        assert no_tokens.shape == (0, 32)
        # Ids past the last expert belong to another rank of an expert-parallel group.
        elsewhere = torch.full((3, 2), experts.num_experts)
        outputs = experts(torch.ones(3, 32), elsewhere, torch.ones(3, 2))
        assert torch.equal(outputs, torch.zeros(3, 32))
        assert model.tiered_mem.stats().num_hbm_hits == 0


def test_budgets_change_while_it_generates(saved: Saved) -> None:
    inputs = padded_batch()
    expected = generate(saved.model, inputs, max_new_tokens=20)
    slot = saved.slot_nbytes
    with saved.on_tiers() as model:
        runtime, done = model.tiered_mem.runtime, threading.Event()

        def resize() -> int:
            count = 0
            while not done.is_set() or count < 20:
                runtime.resize(hbm=(2 + count * 7 % 15) * slot, dram=count * 5 % 8 * slot)
                count += 1
            return count

        def run() -> list[torch.Tensor]:
            try:
                return [generate(model, inputs, max_new_tokens=20) for _ in range(2)]
            finally:
                done.set()

        count, results = in_threads([resize, run])
        assert count >= 20
        assert all(torch.equal(tokens, expected) for tokens in results)


# --- several on one runtime, one store in several processes ---


def test_models_of_other_block_sizes_share_a_runtime(saved: Saved, tmp_path: Path) -> None:
    other = Saved.make("mixtral", tmp_path)
    inputs = padded_batch()
    expected = generate(saved.model, inputs), generate(other.model, inputs)
    with Runtime(6 * max(saved.slot_nbytes, other.slot_nbytes), 20 * saved.slot_nbytes) as runtime:
        small, large = saved.load(runtime=runtime), other.load(runtime=runtime)
        assert small.tiered_mem.layouts[0].nbytes != large.tiered_mem.layouts[0].nbytes
        for _ in range(2):
            assert torch.equal(generate(small, inputs), expected[0])
            assert torch.equal(generate(large, inputs), expected[1])
        results = in_threads([lambda: generate(small, inputs), lambda: generate(large, inputs)] * 2)
        for tokens, right in zip(results, expected * 2, strict=True):
            assert torch.equal(tokens, right)

        small.tiered_mem.close()
        assert not runtime.closed
        with pytest.raises(RuntimeClosedError):
            generate(small, inputs)
        assert torch.equal(generate(large, inputs), expected[1])
        assert runtime.budgets == large.tiered_mem.budgets
        large.tiered_mem.close()
        assert runtime.nbytes_used() == {"hbm": 0, "dram": 0}
        again = saved.load(runtime=runtime)  # in the place of one that left
        assert torch.equal(generate(again, inputs), expected[0])
    with pytest.raises(RuntimeClosedError):
        generate(again, inputs)
    with pytest.raises(RuntimeClosedError, match="make a new one"):
        saved.load(runtime=runtime)
    again.tiered_mem.close()


def test_a_store_serves_two_processes_at_once(saved: Saved, tmp_path: Path) -> None:
    inputs = prompt()
    expected = generate(saved.model, inputs)
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from adapter import Saved, generate, prompt
from pathlib import Path
saved = Saved(Path({str(saved.path)!r}), None, {saved.slot_nbytes})
with saved.on_tiers(nvme={str(tmp_path / "store")!r}) as model:
    print("open", flush=True)
    sys.stdin.readline()
    print(generate(model, prompt()).tolist(), flush=True)
"""
    with (
        saved.on_tiers(nvme=tmp_path / "store") as model,
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        assert torch.equal(generate(model, inputs), expected)
        answer, _ = process.communicate("\n", timeout=120)
    assert process.returncode == 0
    assert answer.strip() == str(expected.tolist())


# --- wrapping and unwrapping ---


def test_wrapping_twice(saved: Saved) -> None:
    inputs = prompt()
    with saved.on_tiers() as model:
        for again in (model, model.model):
            with pytest.raises(AlreadyWrappedError, match="unwrap"):
                tiered_mem.offload(again, hbm="50%")
        assert torch.equal(generate(model, inputs), generate(saved.model, inputs))


@pytest.mark.parametrize("implementation", [None, "eager", "grouped_mm", "batched_mm"])
def test_unwrapping_gives_the_stock_model_back(saved: Saved, implementation: str | None) -> None:
    options = {} if implementation is None else {"experts_implementation": implementation}
    stock = Qwen3MoeForCausalLM.from_pretrained(saved.path, dtype=torch.float32, **options)
    model = saved.load(experts_implementation=implementation)
    assert model.tiered_mem.unwrap() is model
    assert not hasattr(model, "tiered_mem")
    assert model.config._experts_implementation == stock.config._experts_implementation
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), stock.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name
    assert vars(find_experts(model)[0].module).keys() == vars(find_experts(stock)[0].module).keys()
    copied = pickle.loads(pickle.dumps(model))
    inputs = prompt()
    assert torch.equal(families.logits(copied, inputs), families.logits(stock, inputs))
    tiered_mem.offload(copied, hbm="50%").tiered_mem.close()


def test_a_failed_offload_leaves_the_model_as_it_was(
    saved: Saved, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = copy.deepcopy(saved.model), prompt()
    before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no more")

    for target, name in (
        (wrap.Store, "open"),
        (wrap.Runtime, "from_budgets"),
        (wrap.Runtime, "attach"),
        (handle, "RouterHooks"),
        (wrap.ExpertLayout, "copy_expert"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(OSError, match="no more"):
                tiered_mem.offload(model, hbm="50%", nvme=temporary / "store")
        assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == before
        assert not hasattr(model, "tiered_mem") and list(temporary.iterdir()) == []
        assert torch.equal(families.logits(model, inputs), families.logits(saved.model, inputs))
    tiered_mem.offload(model, hbm="50%", nvme=temporary / "store").tiered_mem.close()


def test_unwrapping_gives_every_tensor_its_kind_back(saved: Saved) -> None:
    model, inputs = copy.deepcopy(saved.model), prompt()
    frozen, buffered = [e.module for e in find_experts(model)[:2]]
    frozen.down_proj.requires_grad_(False)
    weight = buffered.down_proj.detach()
    del buffered.down_proj
    buffered.register_buffer("down_proj", weight.clone())
    tiered_mem.offload(model, hbm="50%").tiered_mem.unwrap()
    assert (frozen.down_proj.requires_grad, frozen.gate_up_proj.requires_grad) == (False, True)
    assert list(buffered._parameters) == ["gate_up_proj"]
    assert list(buffered._buffers) == ["down_proj"] and torch.equal(buffered.down_proj, weight)
    assert torch.equal(families.logits(model, inputs), families.logits(saved.model, inputs))


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_offload_removes_what_it_made(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = families.build("qwen3_moe")[0], tmp_path / "store"
    if there:
        directory.mkdir()

    def fail(*_: Any, **__: Any) -> None:
        (directory / "notes.txt").write_text("mine")
        raise OSError("no more")

    monkeypatch.setattr(wrap.ExpertLayout, "copy_expert", fail)
    with pytest.raises(OSError, match="no more"):
        tiered_mem.offload(model, hbm="50%", nvme=directory)
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="isn't empty"):
        tiered_mem.offload(model, hbm="50%", nvme=directory)
    with pytest.raises(ConfigError, match="is a file"):
        tiered_mem.offload(model, hbm="50%", nvme=directory / "notes.txt")
    (directory / "notes.txt").unlink()

    monkeypatch.setattr(wrap.ExpertLayout, "copy_expert", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiered_mem.offload(model, hbm="50%", nvme=directory)
    assert list(directory.iterdir()) == []  # it was there


def test_a_failed_offload_leaves_another_writers_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = families.build("qwen3_moe")[0], prompt()
    expected = families.logits(model, inputs)
    # As another process does right after the directory was found empty.
    monkeypatch.setattr(wrap, "_require_empty", lambda _: None)
    with Store.open(tmp_path / "store", mode="w") as other:
        other.set_metadata({"mine": 1})
        with pytest.raises(StoreBusyError):
            tiered_mem.offload(model, hbm="50%", nvme=tmp_path / "store")
        assert other.metadata == {"mine": 1}
    with pytest.raises(StoreBusyError, match="another process"):
        tiered_mem.offload(model, hbm="50%", nvme=tmp_path / "store")
    with Store.open(tmp_path / "store") as other:
        assert other.metadata == {"mine": 1}
    assert torch.equal(families.logits(model, inputs), expected)


def test_what_a_wrapped_model_refuses(saved: Saved, tmp_path: Path) -> None:
    with saved.on_tiers() as model:
        for refused in (
            lambda: pickle.dumps(model),
            lambda: copy.deepcopy(model),
            lambda: model.save_pretrained(tmp_path),
            lambda: pickle.dumps(model.tiered_mem),
            lambda: pickle.dumps(model.tiered_mem.runtime),
            lambda: torch.save(model, tmp_path / "model.pt"),
        ):
            with pytest.raises(TieredMemError, match=r"unwrap|memory and threads"):
                refused()
        inputs = prompt()
        assert torch.equal(generate(model, inputs), generate(saved.model, inputs))


# --- the end ---


def test_after_close(saved: Saved) -> None:
    model = saved.load()
    generate(model, prompt())
    tiered = model.tiered_mem
    before = tiered.stats()
    tiered.close()
    tiered.close()
    assert tiered.closed and tiered.runtime.closed
    assert tiered.stats() == before
    for use in (lambda: generate(model, prompt()), tiered.unwrap, tiered.fill):
        with pytest.raises(RuntimeClosedError):
            use()
    with pytest.raises(TieredMemError):
        model.save_pretrained("nowhere")


def test_close_gives_the_memory_back(temporary: Path) -> None:
    config = families.tiny_config("qwen3_moe")
    config.update({"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16})
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.float32)
    whole = sum(p.nbytes for key, p in model.named_parameters() if ".experts." in key)
    assert whole > 40 << 20
    model.save_pretrained(temporary / "checkpoint")
    del model
    gc.collect()
    without = memory_nbytes("RssAnon")
    model = tiered_mem.from_pretrained(temporary / "checkpoint", hbm="100%", dram=0)
    model.tiered_mem.fill()
    generate(model, prompt())
    held = memory_nbytes("RssAnon") - without
    assert held > whole // 2
    threads = num_threads()
    model.tiered_mem.close()
    assert memory_nbytes("RssAnon") - without < held - 0.9 * whole
    wait_until(lambda: num_threads() <= threads - 4)  # the I/O threads
    assert [path.name for path in temporary.iterdir()] == ["checkpoint"]
    assert open_files(temporary) == []


def test_a_model_that_is_dropped_gives_everything_back(saved: Saved, temporary: Path) -> None:
    generate(saved.model, prompt())
    threads = num_threads()
    for options in ({"hbm": "auto", "dram": "auto"}, {}):  # with a memory watch, and without
        model = saved.load(**options)
        generate(model, prompt())
        assert len(list(temporary.iterdir())) == 1 and open_files(temporary)
        del model
        assert open_files(temporary, saved.path) == []
        assert list(temporary.iterdir()) == []
        wait_until(lambda: num_threads() <= threads)

    with Runtime(8 * saved.slot_nbytes) as runtime:
        model = saved.load(runtime=runtime)
        generate(model, prompt())
        del model
        gc.collect()
        assert runtime.nbytes_used()["hbm"] == 0
        assert not runtime.closed


def test_a_process_that_ends_leaves_no_store_behind(saved: Saved, temporary: Path) -> None:
    script = f"""
import os, sys, tempfile
tempfile.tempdir = {str(temporary)!r}
sys.path.insert(0, {str(Path(__file__).parent)!r})
from adapter import Saved, generate, prompt
from pathlib import Path
model = Saved(Path({str(saved.path)!r}), None, {saved.slot_nbytes}).load()
child = os.fork()
if child == 0:
    sys.exit(7)  # a child that ends must leave its parent's store alone
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert len(os.listdir(tempfile.tempdir)) == 1
print(generate(model, prompt()).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(generate(saved.model, prompt()).tolist())
    assert list(temporary.iterdir()) == []


def test_what_fails_on_the_way_leaves_nothing(
    saved: Saved, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(saved.model, prompt())
    threads = num_threads()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no more")

    for target, name in (
        (wrap, "open_packed"),
        (wrap, "pack"),
        (wrap, "default_model_class"),
        (Qwen3MoeExperts, "__init__"),
        (wrap.Runtime, "from_budgets"),
        (wrap.Runtime, "attach"),
        (handle, "RouterHooks"),
        (handle, "TieredExperts"),
        (Space, "_add_blocks"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises((OSError, TieredMemError), match="no more"):
                saved.load(hbm="auto")
        assert list(temporary.iterdir()) == [], name
        assert open_files(temporary, saved.path) == [], name
        wait_until(lambda: num_threads() <= threads)
    with Runtime(8 * saved.slot_nbytes) as runtime:
        monkeypatch.setattr(handle, "RouterHooks", fail)
        with pytest.raises(OSError, match="no more"):
            saved.load(runtime=runtime)
        assert runtime.largest_block() == 0  # no model is left on it


@pytest.mark.parametrize("own_runtime", [True, False])
def test_closing_while_another_thread_generates(saved: Saved, own_runtime: bool) -> None:
    with Runtime(3 * saved.slot_nbytes) as runtime:
        model = saved.load(**({"dram": 0} if own_runtime else {"runtime": runtime}))
        slowed = model.tiered_mem.runtime
        slowed.throttle("nvme_to_hbm", 20 * saved.slot_nbytes)  # a token takes a third of a second

        def close() -> None:
            wait_until(lambda: model.tiered_mem.stats().num_events > 1)
            model.tiered_mem.close()

        first, second, closed = in_threads(
            [lambda: generate(model, prompt(), max_new_tokens=99)] * 2 + [close]
        )
        assert closed is None
        assert isinstance(first, RuntimeClosedError) and isinstance(second, RuntimeClosedError)
        assert runtime.nbytes_used()["hbm"] == 0


def test_a_body_that_fails_leaves_no_pins(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompt()
    with Runtime(3 * saved.slot_nbytes) as runtime:
        model = saved.load(runtime=runtime)
        with monkeypatch.context() as patch:
            patch.setattr(Qwen3MoeExperts, "_apply_gate", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError) as caught:
                generate(model, inputs)
        # Its traceback still holds every frame, as a notebook's last one does.
        assert caught.value.__traceback__ is not None
        assert torch.equal(generate(model, inputs), generate(saved.model, inputs))
        model.tiered_mem.close()
        assert runtime.nbytes_used()["hbm"] == 0

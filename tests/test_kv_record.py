"""Recording what caches make, read and give back; a run and its replay decide the same."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tiered_mem
from tiered_mem.bounds import bounds
from tiered_mem.cli import invoke
from tiered_mem.errors import RuntimeClosedError, TraceError
from tiered_mem.simulate import LinkSpeed, Machine, Run, simulate
from tiered_mem.stats import Log
from tiered_mem.trace import Action, Form, Phase, Trace
from tiered_mem.trace_info import examine

MACHINE = Machine(LinkSpeed(2e9, 1e-4), LinkSpeed(2e10), 1e11)
NUM_LAYERS, BLOCK_TOKENS, SLOT = 3, 8, 4096  # a block of 1 KiB takes a page
TOKENIZER = Path(__file__).parent.parent / "benchmarks" / "models" / "tiny-moe" / "tokenizer.json"
POLICIES = ("lru", "adaptive", "arc", "s3-fifo", "w-tinylfu", "least-stale", "per-layer(lfu)")


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tier(stock: PreTrainedModel, num_slots: int = 10, **options: Any) -> Any:
    model = copy.deepcopy(stock)
    return tiered_mem.tier_kv(model, num_slots * SLOT, block_tokens=BLOCK_TOKENS, **options)


@pytest.fixture
def model(stock: PreTrainedModel) -> Iterator[Any]:
    model = tier(stock)
    yield model
    model.tiered_mem.close()


def generate(model: Any, prompt: int = 20, new: int = 30, batch: int = 1, **options: Any) -> None:
    tokens = torch.randint(2, 64, (batch, prompt), generator=torch.Generator().manual_seed(prompt))
    model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        **({"do_sample": False} | options),
    )


def test_a_trace_is_what_the_cache_did(model: Any, tmp_path: Path) -> None:
    with model.tiered_mem.record() as recorder:
        generate(model, prompt=20, new=14)  # the prompt seals two blocks, tokens 24 and 32 two more
        generate(model, prompt=9, new=4)
    trace = recorder.trace("tiny", source="a test")
    assert trace.header.form is Form.EVENTS and trace.header.model == "llama"
    assert trace.header.block_num_tokens == BLOCK_TOKENS
    events = [
        (Action(trace.event_action[i]), int(trace.event_layer[i]), int(trace.event_step[i]))
        for i in range(trace.num_events)
        if trace.event_sequence[i] == 0
    ]
    layers = range(NUM_LAYERS)
    made = [(Action.CREATE, layer, 0) for layer in layers]
    assert events[: NUM_LAYERS * 4] == made + [
        (Action.READ, layer, step) for step in range(20, 23) for layer in layers
    ]
    reads = [event for event in events if event[0] is Action.READ]
    assert len(reads) == 13 * NUM_LAYERS
    assert (Action.CREATE, 0, 23) in events and (Action.CREATE, 2, 31) in events
    assert events[-NUM_LAYERS:] == [(Action.REMOVE, layer, 32) for layer in layers]
    assert trace.event(0).tolist() == trace.event(NUM_LAYERS).tolist()
    assert trace.event_sequence.max() == 1 and trace.event_phase[0] == Phase.PREFILL
    trace.save(tmp_path / "t.npz")
    again = Trace.load(tmp_path / "t.npz")
    assert np.array_equal(again.keys, trace.keys) and np.array_equal(again.action, trace.action)
    assert np.array_equal(again.offsets, trace.offsets)


# DRAM holds all here. Below that, which of its blocks are still on their way up when a victim comes
# down, and so can't make room for it, is a matter of time.
CASES = [*((name, 0) for name in POLICIES), ("lru", 100), ("arc", 100)]


@pytest.mark.parametrize(("eviction", "dram"), CASES)
def test_a_replay_decides_as_the_run_did(stock: PreTrainedModel, eviction: str, dram: int) -> None:
    model = tier(stock, dram=dram * SLOT, eviction=eviction)
    pool = model.tiered_mem
    try:
        pool.runtime.keep_log(True)
        with pool.record() as recorder:
            generate(model, prompt=20, new=20)
            generate(model, prompt=33, new=12, batch=2)
            generate(model, prompt=40, new=6, num_beams=2)
        happened, stats, budgets = pool.runtime.take_log(), pool.stats(), pool.budgets
        logs: list[Log] = []
        run = simulate(
            recorder.trace(),
            hbm=budgets.hbm,
            dram=budgets.dram,
            eviction=eviction,
            machine=MACHINE,
            on_log=logs.append,
        )
    finally:
        pool.close()
    assert np.array_equal(logs[0].keys, happened.keys)
    assert np.array_equal(logs[0].happenings, happened.happenings)
    assert run.num_accesses == stats.num_accesses
    assert run.num_hits == stats.num_hbm_hits > 0
    assert run.num_misses == stats.num_dram_hits + stats.num_nvme_reads > 0
    assert run.num_dram_hits == stats.num_dram_hits and (run.num_dram_hits > 0) == bool(dram)
    assert run.num_evictions == stats.num_evictions > 0


@pytest.fixture(scope="module")
def recorded(stock: PreTrainedModel) -> Trace:
    model = tier(stock, eviction="lru")
    with model.tiered_mem.record() as recorder:
        generate(model, prompt=40, new=20)
        generate(model, prompt=33, new=10, batch=2)
    model.tiered_mem.close()
    return recorder.trace("kv")


def replay(trace: Trace, num_slots: int, eviction: str = "lru", **options: Any) -> Run:
    return simulate(trace, hbm=num_slots * SLOT, eviction=eviction, machine=MACHINE, **options)


def test_what_is_made_is_in_hbm_without_being_read(recorded: Trace) -> None:
    run = replay(recorded, 1000)
    assert run.num_hits == run.num_accesses == recorded.reads.num_accesses
    assert run.num_evictions == 0 and run.nbytes_moved["nvme_to_hbm"] == 0
    assert run.num_events == recorded.reads.num_events < recorded.num_events
    # What is removed makes room: the first sequence's blocks aren't there beside the second's.
    whole = recorded.total_nbytes // 1024
    assert whole < len(recorded.blocks[0])
    assert replay(recorded, whole).num_evictions == 0


@pytest.mark.parametrize("num_slots", [4, 10, 20])
def test_no_policy_beats_the_bounds(recorded: Trace, num_slots: int) -> None:
    limits = bounds(recorded, hbm=num_slots * SLOT, machine=MACHINE)
    assert limits.num_accesses == recorded.reads.num_accesses
    assert limits.num_misses_bypass == limits.num_misses_forced, "events go in short waves"
    for eviction in ("lru", "arc", "adaptive", "belady"):
        run = replay(recorded, num_slots, eviction)
        assert run.num_misses >= limits.num_misses_bypass
        assert run.stall_seconds >= limits.stall_seconds_lower
        assert run.byte_miss_ratio >= limits.byte_miss_ratio_lower
    assert bounds(recorded, hbm=1000 * SLOT, machine=MACHINE).num_misses_forced == 0


def test_prefetch_of_blocks_to_come(recorded: Trace) -> None:
    run = replay(recorded, 30, prefetch="oracle")
    assert run.num_hints > 0
    assert run.num_accesses == recorded.reads.num_accesses


def test_info_counts_what_comes_and_goes(recorded: Trace) -> None:
    info = examine(recorded)
    created = {int(key) for key in recorded.created}
    assert info.num_created == len(created) == info.num_removed
    assert info.num_compulsory_misses == 0 and info.ceiling == 1
    assert info.num_accesses == recorded.reads.num_accesses
    assert info.accesses_by_kind == {"KV": info.num_accesses}
    assert info.total_nbytes == recorded.total_nbytes < info.nbytes


def test_blocks_that_were_there_before(model: Any) -> None:
    cache = model.tiered_mem.cache()
    tokens = torch.randint(2, 64, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache)
        with model.tiered_mem.record() as recorder:
            model(input_ids=tokens[:, :1], past_key_values=cache)
    trace = recorder.trace()
    assert set(trace.event_action.tolist()) == {Action.READ}
    assert examine(trace).num_compulsory_misses == 3 * NUM_LAYERS
    assert replay(trace, 100).num_hits == 0


def test_recording_ends(model: Any) -> None:
    with model.tiered_mem.record() as recorder:
        generate(model)
    count = recorder.trace().num_events
    generate(model)
    assert recorder.trace().num_events == count
    with model.tiered_mem.record() as none:
        generate(model, prompt=3, new=2)
    with pytest.raises(TraceError, match="no cache read a block"):
        none.trace()
    model.tiered_mem.close()
    with pytest.raises(RuntimeClosedError), model.tiered_mem.record():
        pass


@pytest.mark.parametrize("source", ["prompt", "text"])
def test_the_command_records_and_compares(
    stock: PreTrainedModel, source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stock.save_pretrained(tmp_path / "model")
    shutil.copy(TOKENIZER, tmp_path / "model")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    words = "a b c d e f g h i j k l m n o p " * 9
    (tmp_path / "words.txt").write_text(words)
    given = ["--prompt", words] if source == "prompt" else ["--text", str(tmp_path / "words.txt")]
    out = tmp_path / "kv.npz"
    command = ["trace", "record", str(tmp_path / "model"), "-o", str(out), "--kv", "64KiB"]
    assert invoke([*command, *given, "--max-tokens", "160", "--json"]) == 0
    trace = Trace.load(out)
    assert json.loads(capfd.readouterr().out)["num_accesses"] == trace.reads.num_accesses > 0
    assert trace.header.block_num_tokens == 128
    assert invoke(["trace", "info", str(out)]) == 0
    told = capfd.readouterr().out
    assert "3 created, 3 removed" in told and "kv (" in told
    report = tmp_path / "report"
    assert invoke(["compare", str(out), "-o", str(report), "--hbm", "50%,100%", "-j", "1"]) == 0
    runs = json.loads((report / "results.json").read_text())["runs"]
    assert {run["hit_rate"] for run in runs if run["hbm"] == "100%"} == {1.0}
    assert {run["prefetch"] for run in runs} >= {"none"}
    assert invoke([*command, *given, "--hidden", "--force"]) == 2
    assert "leave it out with --kv" in capfd.readouterr().err

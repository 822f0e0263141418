"""The command: what it prints, its exit codes, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiered_mem import _core, cli
from tiered_mem.cli import invoke
from tiered_mem.config import WorkingSet
from tiered_mem.doctor import PROBE_NBYTES, advise
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store

MODEL = str(Path(__file__).parents[1] / "benchmarks" / "models" / "tiny-moe")
NUM_EXPERTS = 6 * 32
PROMPT = "And the king said"
COMMAND = [sys.executable, "-m", "tiered_mem"]


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def tiered_mem(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        code = invoke([str(argument) for argument in arguments])
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("packed") / "store"
    assert invoke(["pack", MODEL, str(store)]) == 0
    return store


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    """A store of its own for a test that changes it."""
    return Path(shutil.copytree(packed, tmp_path / "store"))


def flip_bit(store: Path, layer: int, index: int) -> None:
    with Store.open(store) as opened, opened.snapshot() as snapshot:
        offset = snapshot.extent(BlockKey(Kind.EXPERT, layer, index)).offset
    with (store / "data.mdb").open("r+b") as file:
        file.seek(offset + 1000)
        byte = file.read(1)[0]
        file.seek(offset + 1000)
        file.write(bytes([byte ^ 16]))


def drop_blocks(store: Path, layer: int, indices: range) -> None:
    with Store.open(store, mode="w") as opened, opened.transaction() as txn:
        for index in indices:
            assert txn.delete(BlockKey(Kind.EXPERT, layer, index))


# --- every command ---


def test_help_names_every_command(tiered_mem: Command) -> None:
    done = tiered_mem("--help")
    assert done.code == 0
    for name in ("pack", "run", "verify", "doctor", "policies"):
        assert name in done.out
        assert tiered_mem(name, "--help").code == 0


BAD_INPUT = {
    "unknown command": (["dance"], "No such command 'dance'"),
    "unknown option": (["pack", MODEL, "{tmp}/s", "--fast"], "No such option"),
    "missing argument": (["pack", MODEL], "Missing argument"),
    "extra argument": (["policies", "more"], "unexpected extra argument"),
    "unknown codec": (["pack", MODEL, "{tmp}/s", "--codec", "rar"], "'rar'"),
    "unknown dtype": (["pack", MODEL, "{tmp}/s", "--dtype", "int3"], "'int3'"),
    "no checkpoint": (["pack", "{tmp}/nothing", "{tmp}/s"], "no checkpoint at {tmp}/nothing"),
    "capacity too small": (["pack", MODEL, "{tmp}/s", "--capacity", "1MiB"], "capacity"),
    "capacity no size": (["pack", MODEL, "{tmp}/s", "--capacity", "big"], "not a size: 'big'"),
    "store is a file": (["pack", MODEL, MODEL + "/config.json"], "config.json"),
    "store holds other files": (["pack", MODEL, MODEL], "holds no store"),
    "no store": (["verify", "{tmp}"], "no store at {tmp}"),
    "no prompt": (["run", MODEL], "--prompt"),
    "empty prompt": (["run", MODEL, "--prompt", ""], "no token"),
    "no tokens": (["run", MODEL, "--prompt", "a", "--max-new-tokens", "0"], "max-new-tokens"),
    "size": (["run", MODEL, "--prompt", "a", "--hbm", "5Q"], "not a size: '5Q'"),
    "zero": (["run", MODEL, "--prompt", "a", "--hbm", "0"], "hbm"),
    "negative": (["run", MODEL, "--prompt", "a", "--dram", "-5"], "-5"),
    "too large": (["run", MODEL, "--prompt", "a", "--hbm", "900TiB"], "more than the"),
    "below one event": (["run", MODEL, "--prompt", "a", "--hbm", "100KiB"], "147456 bytes"),
    "eviction": (["run", MODEL, "--prompt", "a", "--eviction", "magic"], "there are: adaptive"),
    "prefetch": (["run", MODEL, "--prompt", "a", "--prefetch", "magic"], "next-gate"),
    "temperature": (["run", MODEL, "--prompt", "a", "--temperature", "-1"], "temperature"),
    "no directory": (["doctor", "{tmp}/nothing"], "not a directory"),
    "probe size": (["doctor", "{tmp}", "--size", "1Z"], "not a size: '1Z'"),
    "probe too large": (["doctor", "{tmp}", "--size", "900TiB"], "name another directory"),
}


@pytest.mark.parametrize(("arguments", "told"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_code_2(
    tiered_mem: Command, tmp_path: Path, arguments: list[str], told: str
) -> None:
    done = tiered_mem(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("tiered-mem: ")
    assert told.format(tmp=tmp_path) in line
    assert list(tmp_path.iterdir()) == []


def test_no_arguments_print_the_help(tiered_mem: Command) -> None:
    done = tiered_mem()
    assert done.code == 2
    assert "Usage" in done.out + done.err


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, "policies"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == ""


def test_ctrl_c_is_one_line_and_code_130(packed: Path) -> None:
    command = [*COMMAND, "run", MODEL, "--nvme", str(packed), "--prompt", PROMPT]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "100000", "--temperature", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    assert process.stdout.read(len(PROMPT) + 20).startswith(PROMPT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    watchdog.cancel()
    assert (process.returncode, err) == (130, "interrupted\n")


# --- pack and verify ---


def test_pack_goes_on_where_it_left_off(tiered_mem: Command, store: Path) -> None:
    drop_blocks(store, 2, range(5, 9))
    assert tiered_mem("verify", store).code == 1
    report = tiered_mem("pack", MODEL, store, "--json").json
    assert (report["num_blocks"], report["num_packed"]) == (NUM_EXPERTS, 4)
    done = tiered_mem("pack", MODEL, store)
    assert done.code == 0
    assert f"{NUM_EXPERTS} experts, {NUM_EXPERTS} of them there already" in done.out
    assert tiered_mem("verify", store).code == 0


def test_pack_says_what_it_took(tiered_mem: Command, tmp_path: Path) -> None:
    sizes = {}
    for codec in ("none", "zstd"):
        report = tiered_mem("pack", MODEL, tmp_path / codec, "--codec", codec, "--json").json
        assert report["codec"] == codec
        sizes[codec] = report["store_nbytes"]
    assert sizes["none"] >= report["nbytes"] == NUM_EXPERTS * 36864
    assert sizes["zstd"] < sizes["none"]


def test_pack_refuses_the_store_of_another_dtype(tiered_mem: Command, store: Path) -> None:
    done = tiered_mem("pack", MODEL, store, "--dtype", "float32")
    assert done.code == 2
    assert "they differ in dtype" in done.err
    assert tiered_mem("verify", store).code == 0


def test_verify_of_a_sound_store(tiered_mem: Command, packed: Path) -> None:
    done = tiered_mem("verify", packed)
    assert done.code == 0
    assert f"sound: {NUM_EXPERTS} blocks" in done.out
    found = tiered_mem("verify", packed, "--json").json
    assert found["sound"] is True
    assert found["num_blocks"] == NUM_EXPERTS


def test_verify_names_damaged_blocks_and_repairs_them(tiered_mem: Command, store: Path) -> None:
    flip_bit(store, 3, 17)
    flip_bit(store, 0, 4)
    done = tiered_mem("verify", store)
    assert done.code == 1
    assert "damaged: expert 4 of layer 0\ndamaged: expert 17 of layer 3\n" in done.out
    done = tiered_mem("verify", store, "--json")
    assert done.code == 1
    assert [(key["layer"], key["index"]) for key in done.json["damaged"]] == [(0, 4), (3, 17)]
    drop_blocks(store, 5, range(2))
    done = tiered_mem("verify", store, "--repair", MODEL)
    assert done.code == 0
    assert "missing: 2 blocks from expert 0 of layer 5 on" in done.out
    assert "4 repaired" in done.out
    assert tiered_mem("verify", store).code == 0


def test_repair_from_another_checkpoint_drops_nothing(
    tiered_mem: Command, store: Path, tmp_path: Path
) -> None:
    flip_bit(store, 1, 1)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    other = tmp_path / "other"
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(2)
    model.save_pretrained(other)
    done = tiered_mem("verify", store, "--repair", other)
    assert done.code == 2
    assert "was packed from" in done.err
    assert tiered_mem("verify", store, "--json").json["num_blocks"] == NUM_EXPERTS


# --- run ---


def stock_tokens(num_tokens: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    whole = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    tokens: list[int] = whole[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def test_run_streams_text_and_shows_what_moved(tiered_mem: Command, packed: Path) -> None:
    options = ["--hbm", "25%", "--dram", "25%", "--nvme", packed, "--max-new-tokens", "12"]
    done = tiered_mem("run", MODEL, "--prompt", PROMPT, *options, "--check")
    assert done.code == 0
    text = AutoTokenizer.from_pretrained(MODEL).decode(stock_tokens(12))
    assert done.out.startswith(PROMPT + text)
    for row in ("tokens/s", "hits in HBM", "reads from NVMe", "NVMe to HBM", "stall", "prefetch"):
        assert row in done.out
    assert "host memory plays its part" in done.out
    assert "identical to" in done.out


def test_run_as_json(tiered_mem: Command, packed: Path) -> None:
    options = ["--hbm", "2MiB", "--dram", "500KB", "--nvme", packed, "--max-new-tokens", "12"]
    done = tiered_mem("run", MODEL, "--prompt", PROMPT, *options, "--json")
    answer = done.json
    assert answer["tokens"] == stock_tokens(12)
    assert (answer["hbm_nbytes"], answer["dram_nbytes"]) == (2 << 20, 500_000)
    assert answer["same_as_without_offload"] is None
    stats = answer["stats"]
    assert stats["num_events"] == 12 * 6
    assert stats["num_nvme_reads"] > 0
    assert 0 < stats["hit_rate"] < 1


def test_run_samples_the_same_tokens_as_the_model_without_offload(
    tiered_mem: Command, packed: Path
) -> None:
    options = ["--prompt", PROMPT, "--hbm", "25%", "--nvme", packed, "--max-new-tokens", "12"]
    sampled = ["--temperature", "1.5", "--json"]
    one = tiered_mem("run", MODEL, *options, *sampled, "--seed", "1", "--check").json
    other = tiered_mem("run", MODEL, *options, *sampled, "--seed", "2").json
    assert one["same_as_without_offload"] is True
    assert one["tokens"] != other["tokens"]


def test_check_fails_with_code_1(
    tiered_mem: Command, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def load_another(path: str, **options: Any) -> Any:
        model = load(path, **options)
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj.mul_(-20)
        return model

    monkeypatch.setattr(
        "tiered_mem.cli.run._Question.load_stock", lambda question, device: load_another(MODEL)
    )
    options = ["--prompt", PROMPT, "--nvme", packed, "--max-new-tokens", "12", "--check"]
    done = tiered_mem("run", MODEL, *options)
    assert done.code == 1
    assert "DIFFERENT from" in done.out


def test_run_below_a_cycle_warns_with_the_size_needed(tiered_mem: Command, packed: Path) -> None:
    options = ["--prompt", PROMPT, "--hbm", "500KiB", "--dram", "0", "--nvme", packed]
    done = tiered_mem("run", MODEL, *options, "--max-new-tokens", "2")
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line.startswith("warning: ")
    assert f"{6 * 4 * 36864} bytes" in line


def test_run_mends_a_damaged_block_and_counts_it(tiered_mem: Command, store: Path) -> None:
    for index in range(32):
        flip_bit(store, 0, index)
    options = ["--prompt", PROMPT, "--hbm", "25%", "--nvme", store, "--max-new-tokens", "4"]
    answer = tiered_mem("run", MODEL, *options, "--json", "--check").json
    assert answer["same_as_without_offload"] is True
    assert answer["stats"]["num_repaired"] > 0


# --- doctor and policies ---


def test_doctor_measures_and_leaves_nothing_behind(tiered_mem: Command, tmp_path: Path) -> None:
    done = tiered_mem("doctor", tmp_path, "--size", "8MiB", "--checkpoint", MODEL)
    assert done.code == 0
    for word in ("HBM", "memcpy", "pinning", "huge pages", "free", "--hbm", "144.0 KiB"):
        assert word in done.out
    found = tiered_mem("doctor", tmp_path, "--size", "8MiB", "--json").json
    assert [link["name"] for link in found["links"]] == [
        "DRAM to HBM",
        "DRAM to NVMe",
        "NVMe to HBM",
        "NVMe to HBM",
    ]
    assert all(link["bytes_per_second"] > 0 for link in found["links"])
    assert found["memory"]["spare_nbytes"] < found["memory"]["total_nbytes"]
    assert found["filesystem"]["free_nbytes"] > PROBE_NBYTES
    assert list(tmp_path.iterdir()) == []


def test_advice_follows_what_is_spare() -> None:
    mib = 1 << 20
    model = WorkingSet(experts_nbytes=1000 * mib + 1, cycle_nbytes=100 * mib, event_nbytes=10 * mib)
    fits = advise(2000 * mib, model)
    assert (fits.hbm, fits.dram) == ("1001MiB", "0")
    assert "every expert fits" in fits.why
    assert advise(500 * mib, model).hbm == "500MiB"
    assert "above one token's cycle" in advise(500 * mib, model).why
    assert "per-layer(lru)" in advise(50 * mib, model).why
    assert "too little" in advise(5 * mib, model).why
    assert advise(500 * mib).hbm == "500MiB"


def test_policies_lists_what_run_takes(tiered_mem: Command) -> None:
    found = tiered_mem("policies", "--json").json
    eviction = [policy["name"] for policy in found["eviction"]]
    assert {"lru", "fifo"} <= set(eviction)
    for name in set(eviction) - {"belady"}:  # which exists in the simulator only
        _core.check_eviction(name.replace("(X)", "(lru)"))
    assert {"none", "next-gate"} <= {policy["name"] for policy in found["prefetch"]}
    assert all(policy["summary"] and policy["source"] for kind in found.values() for policy in kind)
    listed = tiered_mem("policies").out
    assert all(name in listed for name in eviction)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.npz"), "a.npz: .*check the name"),
        (OSError(28, "No space left on device", "store"), "store: No space.*make room"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied; change its perm"),
        (OSError(107, "Transport endpoint is not connected"), "not connected; see the system's"),
        (OSError("no number"), "no number"),
    ],
)
def test_a_bare_os_error_says_what_to_do(
    error: OSError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.invoke(["policies"]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"tiered-mem: .*{line}.*\n", err), err


@pytest.mark.parametrize(
    ("device", "says"), [("nowhere", "is no device"), ("cuda:77", "can't be used|there is no")]
)
def test_a_device_that_isnt_there_exits_with_2(
    tiered_mem: Command, device: str, says: str, tmp_path: Path
) -> None:
    options = ["--prompt", PROMPT, "--device", device, "--nvme", str(tmp_path / "store")]
    done = tiered_mem("run", str(MODEL), *options)
    assert done.code == 2
    assert re.search(says, done.err)

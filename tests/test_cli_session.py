"""`run --kv` and `run --session`: processes that go on with a conversation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiered_mem.cli import invoke
from tiered_mem.cli.conversation import Conversation
from tiered_mem.errors import ConfigError

MODEL = str(Path(__file__).parents[1] / "benchmarks" / "models" / "tiny-moe")
RUN = ["run", MODEL, "--hbm", "50%", "--dram", "0", "--dtype", "float32", "--json"]


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capfd.readouterr()
    code = invoke([*RUN, *arguments])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_a_session_goes_on(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--kv", "256KiB", "--nvme", str(tmp_path / "nvme"), "--session", "king"]
    first = run(capfd, "--prompt", "And the king said", "--max-new-tokens", "140", *options)
    assert first["kv"]["num_restored_tokens"] == 0
    second = run(capfd, "--prompt", " and", "--max-new-tokens", "12", "--check", *options)
    assert second["same_as_without_offload"]
    assert second["num_prompt_tokens"] > 140
    assert second["kv"]["num_restored_tokens"] == 128
    assert second["kv"]["stats"]["num_nvme_reads"] > 0
    other = [*options[:-1], "other"]
    third = run(capfd, "--prompt", "And the king said", "--max-new-tokens", "3", *other)
    assert third["tokens"] == first["tokens"][:3]


def test_bad_input(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = str(tmp_path / "nvme")
    for arguments, words in (
        (["--session", "a"], "needs --kv and --nvme"),
        (["--session", "a", "--kv", "1MiB"], "needs --kv and --nvme"),
        (["--session", "../a", "--kv", "1MiB", "--nvme", store], "can't name a session"),
        (["--kv", "lots"], "not a size"),
        (["--kv", "4KiB"], "give a larger budget"),
        (["--kv-dram", "1MiB"], "give kv"),
    ):
        capfd.readouterr()
        assert invoke([*RUN, "--prompt", "x", *arguments]) == 2
        err = capfd.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("tiered-mem: ") and words in err


def test_a_session_of_another_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--kv", "256KiB", "--nvme", str(tmp_path), "--session", "a"]
    run(capfd, "--prompt", "x", "--max-new-tokens", "1", *options)
    Conversation(tmp_path, "a").save([1, 70_000])
    capfd.readouterr()
    assert invoke([*RUN, "--prompt", "x", *options]) == 2
    assert "tokens of another model" in capfd.readouterr().err


def test_only_the_start_gets_what_tokenizers_put_in_front(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(MODEL, checkpoint)
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    special = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    file.write_text(json.dumps(tokenizer))
    options = ["--kv", "256KiB", "--nvme", str(tmp_path / "nvme"), "--session", "a"]
    arguments = ["run", str(checkpoint), *RUN[2:], "--max-new-tokens", "2", *options]
    for _ in range(2):
        assert invoke([*arguments, "--prompt", "And the king"]) == 0
    tokens = Conversation(tmp_path / "nvme", "a").tokens
    assert tokens[0] == 0 and 0 not in tokens[1:]


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"tokens": 3}', '{"tokens": [-1]}', '{"tokens": [9999999999]}', "[1]"],
)
def test_a_damaged_session_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="is no stored session"):
        Conversation(tmp_path, "a")


def test_a_session_is_replaced_whole(tmp_path: Path) -> None:
    conversation = Conversation(tmp_path, "a.b-c_1")
    assert conversation.tokens == []
    conversation.save([3, 4])
    Conversation(tmp_path, "a.b-c_1").save([3, 4, 5])
    assert Conversation(tmp_path, "a.b-c_1").tokens == [3, 4, 5]
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == ["a.b-c_1.json"]

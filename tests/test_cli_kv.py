"""`tiered-mem kv`: what is stored, making room, and finding damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiered_mem.cli import invoke
from tiered_mem.prefixes import Group, PrefixStore
from tiered_mem.store import Store

LAYOUT = {"block_tokens": 4, "dtype": "float32"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two models' prefixes: chains of 3 and 2 blocks of tokens, that share none."""
    path = tmp_path / "prefixes"
    for model, length in (("one", 3), ("two", 2)):
        with PrefixStore.open(path, fingerprint=model, layout=LAYOUT) as prefixes:
            parent = prefixes.root
            for i in range(length):
                blocks = [(layer, bytes([i + layer]) * 5000) for layer in range(2)]
                group = Group(parent, np.arange(4) + i, blocks)
                (record,) = prefixes.save([group])
                parent = record.hash
    return path


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = invoke(["kv", *map(str, arguments)])
    return code, *capfd.readouterr()


def flip_a_bit(path: Path) -> None:
    with PrefixStore.inspect(path) as prefixes, prefixes.store.snapshot() as snapshot:
        model = next(
            root
            for root, about in prefixes.store.metadata["models"].items()
            if about["fingerprint"] == "one"
        )
        own = [r for r in prefixes.index.records.values() if r.root.hex() == model]
        second = sorted(own, key=lambda record: record.index)[1]
        offset = snapshot.extent(second.keys[0]).offset
    with open(path / "payload.bin", "r+b") as file:
        file.seek(offset + 7)
        byte = file.read(1)[0]
        file.seek(offset + 7)
        file.write(bytes([byte ^ 1]))


def test_ls(capfd: pytest.CaptureFixture[str], store: Path) -> None:
    code, out, _ = run(capfd, "ls", store, "--json")
    models: list[Any] = json.loads(out)["models"]
    assert code == 0
    assert {m["fingerprint"]: (m["num_chains"], m["num_tokens"]) for m in models} == {
        "one": (1, 12),
        "two": (1, 8),
    }
    code, out, _ = run(capfd, "ls", store)
    assert code == 0 and "block_tokens=4" in out and "12" in out


def test_gc(capfd: pytest.CaptureFixture[str], store: Path) -> None:
    code, out, _ = run(capfd, "gc", store, "--json")
    whole = json.loads(out)
    assert (code, whole["num_removed"], whole["num_blocks"]) == (0, 0, 5)
    code, out, _ = run(capfd, "gc", store, "--capacity", str(whole["nbytes"] // 2))
    assert code == 0 and "3 blocks of tokens removed, 2 left" in out
    assert run(capfd, "gc", store, "--max-age", "1")[1].startswith("0 blocks")
    assert run(capfd, "gc", store, "--max-age", "0")[1].startswith("2 blocks of tokens removed, 0")


def test_verify(capfd: pytest.CaptureFixture[str], store: Path) -> None:
    code, out, _ = run(capfd, "verify", store)
    assert code == 0 and "is sound: 5 blocks" in out
    flip_a_bit(store)
    code, out, _ = run(capfd, "verify", store)
    assert code == 1 and "1 blocks of tokens damaged" in out and "--repair" in out
    code, out, _ = run(capfd, "verify", store, "--repair", "--json")
    assert code == 0
    assert json.loads(out) | {"store": ""} == {
        "store": "",
        "num_blocks": 3,
        "num_damaged": 1,
        "num_broken_records": 0,
        "num_orphans": 0,
        "num_removed": 2,
        "sound": True,
    }
    code, out, _ = run(capfd, "verify", store)
    assert code == 0 and "is sound: 3 blocks" in out


@pytest.mark.parametrize("command", ["ls", "gc", "verify"])
def test_other_directories_are_refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    Store.open(tmp_path / "empty", mode="w").close()
    (tmp_path / "plain").mkdir()
    for name in ("missing", "plain", "empty"):
        code, _, err = run(capfd, command, tmp_path / name)
        assert code == 2
        assert len(err.strip().splitlines()) == 1 and name in err
    assert not (tmp_path / "missing").exists()


def test_bad_options(capfd: pytest.CaptureFixture[str], store: Path) -> None:
    for options in (["--capacity", "lots"], ["--capacity", "5%"], ["--max-age", "-1"]):
        code, _, err = run(capfd, "gc", store, *options)
        assert code == 2 and len(err.strip().splitlines()) == 1
    assert run(capfd, "frobnicate", store)[0] == 2

"""`tiered-mem trace`: what it prints and writes, its exit codes, and one line for bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tiered_mem.cli import invoke
from tiered_mem.cli.trace import Format
from tiered_mem.trace import Form, Trace, TraceHeader
from tiered_mem.trace_formats import FORMATS
from tiered_mem.trace_info import examine

ROUTES = """\
# route_trace v1
# model=toy.gguf arch=toy n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=1024 dense_bytes=10
# layer=1 expert_bytes=2048 dense_bytes=10
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,5,0.7,0,1024
0,0,0,0,1,2,0.3,0,1024
0,0,1,0,0,5,0.6,0,0
0,0,1,0,1,3,0.4,0,1024
0,1,2,0,0,5,0.6,1,0
0,1,2,0,1,1,0.4,0,1024
0,1,2,1,0,7,0.6,0,2048
0,1,2,1,1,6,0.4,0,2048
0,1,3,0,0,5,0.6,1,0
0,1,3,0,1,2,0.4,1,0
"""
REQUESTS = '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}\n' * 2


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def trace(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `tiered-mem trace` in this process."""

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        code = invoke(["trace", *map(str, arguments)])
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def routes(tmp_path: Path) -> Path:
    path = tmp_path / "toy.route.csv"
    path.write_text(ROUTES)
    return path


def test_help_names_every_command(trace: Command) -> None:
    done = trace("--help")
    assert done.code == 0
    for name in ("import", "info", "export"):
        assert name in done.out
        assert trace(name, "--help").code == 0
    assert [format.value for format in Format] == [format.name for format in FORMATS]


def test_import_info_export_and_back(trace: Command, routes: Path, tmp_path: Path) -> None:
    done = trace("import", routes, "-o", tmp_path / "toy.npz")
    assert (done.code, done.err) == (0, "")
    assert "4 events with 9 accesses to 6 blocks; all there are take 24.0 KiB" in done.out
    done = trace("info", tmp_path / "toy.npz")
    assert (done.code, done.err) == (0, "")
    for part in (
        "toy: 2 layer(s) of 8 experts, top-2",
        "toy.route.csv",
        "9 expert (3 prefill, 6 decode)",
        "6, 8.0 KiB of 24.0 KiB",
        "4 slots, 6.0 KiB: with less, a global LRU hits next to nothing",
        "33.3 % hits with an endless cache; 6 misses are compulsory",
        "50.0 % of decode's blocks",
    ):
        assert part in done.out
    for name in ("flat.bin", "flat.oracleGeneral.zst"):
        done = trace("export", tmp_path / "toy.npz", "-o", tmp_path / name)
        assert (done.code, done.err) == (0, "")
        assert "10 records" in done.out
        done = trace("import", tmp_path / name, "-o", tmp_path / "flat.npz", "--force")
        assert (done.code, done.err) == (0, "")
        flat, toy = Trace.load(tmp_path / "flat.npz"), Trace.load(tmp_path / "toy.npz")
        assert np.array_equal(flat.keys, toy.flat_keys)


def test_json(trace: Command, routes: Path, tmp_path: Path) -> None:
    report = trace("import", routes, "-o", tmp_path / "toy.npz", "--json").json
    assert report["form"] == "events"
    assert report["model"] == "toy"
    assert (report["num_rows"], report["num_accesses"], report["num_blocks"]) == (10, 9, 6)
    found = trace("info", tmp_path / "toy.npz", "--json").json
    expected = examine(Trace.load(tmp_path / "toy.npz")).as_dict()
    assert found == json.loads(json.dumps(expected))


def test_info_names_what_was_recorded(trace: Command, routes: Path, tmp_path: Path) -> None:
    times = np.arange(2) / 4
    header = TraceHeader(Form.EVENTS)
    columns: dict[str, Any] = {"gap_seconds": times, "compute_seconds": times}
    recorded = Trace.from_rows(header, index=[1, 2], step=[0, 1], nbytes=1, token=[7, 7], **columns)
    recorded.save(tmp_path / "x.npz")
    out = trace("info", tmp_path / "x.npz").out
    assert "token ids, times between events, times of events" in out
    found = trace("info", tmp_path / "x.npz", "--json").json
    assert found["recorded"] == ["row_token", "gap_seconds", "compute_seconds"]


def test_sizes_and_format_by_option(trace: Command, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(REQUESTS)
    options = ["--format", "mooncake", "--token-nbytes", "1KiB", "-o", tmp_path / "x.npz"]
    assert "(1024 bytes a token)" in trace("import", tmp_path / "x.jsonl", *options).out
    assert Trace.load(tmp_path / "x.npz").nbytes.tolist() == [512 * 1024] * 4
    out = trace("info", tmp_path / "x.npz").out
    assert "50.0 % hits" in out
    assert "cycle" not in out


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "no command": ([], ""),
    "unknown command": (["dance"], "No such command 'dance'"),
    "no output": (["import", "{tmp}/toy.route.csv"], "Missing option"),
    "unknown format": (["import", "{tmp}/toy.route.csv", "-o", "{tmp}/x", "--format", "a"], "'a'"),
    "other format": (
        ["import", "{tmp}/toy.route.csv", "-o", "{tmp}/x", "--format", "mooncake"],
        "{tmp}/toy.route.csv, line 1: not JSON",
    ),
    "no file": (["import", "{tmp}/nothing", "-o", "{tmp}/x"], "{tmp}/nothing"),
    "directory": (["import", "{tmp}", "-o", "{tmp}/x"], "{tmp}"),
    "bad row": (["import", "{tmp}/bad.csv", "-o", "{tmp}/x"], "{tmp}/bad.csv, line 16: expert is"),
    "empty": (["import", "{tmp}/empty", "-o", "{tmp}/x"], "{tmp}/empty is empty"),
    "needless size": (
        ["import", "{tmp}/toy.route.csv", "-o", "{tmp}/x", "--token-nbytes", "3"],
        "route-csv has no use for token_nbytes",
    ),
    "bad size": (
        ["import", "{tmp}/requests.jsonl", "-o", "{tmp}/x", "--token-nbytes", "some"],
        "not a size: 'some'",
    ),
    "no directory": (
        ["import", "{tmp}/toy.route.csv", "-o", "{tmp}/no/x"],
        "no directory {tmp}/no",
    ),
    "into a directory": (["import", "{tmp}/toy.route.csv", "-o", "{tmp}"], "is a directory"),
    "no plain file": (
        ["import", "{tmp}/toy.route.csv", "-o", "/dev/null", "--force"],
        "/dev/null is no plain file",
    ),
    "there already": (["import", "{tmp}/toy.route.csv", "-o", "{tmp}/empty"], "there already"),
    "info of a CSV": (["info", "{tmp}/toy.route.csv"], "see tiered-mem trace import"),
    "info of nothing": (["info", "{tmp}/nothing"], "{tmp}/nothing"),
    "export of a CSV": (["export", "{tmp}/toy.route.csv", "-o", "{tmp}/x"], "is not a trace"),
    "export over a file": (["export", "{tmp}/nothing", "-o", "{tmp}/empty"], "there already"),
    "export as": (["export", "{tmp}/n", "-o", "{tmp}/x", "--format", "tape"], "'tape'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_code_2(
    trace: Command, routes: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.csv").write_text(ROUTES + "0,1,3,1,0,99,0.6,0,0\n")
    (tmp_path / "empty").touch()
    (tmp_path / "requests.jsonl").write_text(REQUESTS)
    before = {path.name for path in tmp_path.iterdir()}
    done = trace(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.code == 2
    assert message.format(tmp=tmp_path) in done.err
    assert len(done.err.splitlines()) == (1 if arguments else 0)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "empty").read_bytes() == b""


def test_force_overwrites(trace: Command, routes: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.npz"
    target.write_text("precious")
    assert trace("import", routes, "-o", target).code == 2
    assert target.read_text() == "precious"
    assert trace("import", routes, "-o", target, "--force").code == 0
    assert trace("info", target).code == 0


def test_a_warning_is_one_line(trace: Command, tmp_path: Path) -> None:
    record = np.dtype([("time", "<u4"), ("id", "<u8"), ("nbytes", "<u4"), ("next", "<i8")])
    np.array([(0, 1, 0, -1), (0, 2, 5, -1)], record).tofile(tmp_path / "x.bin")
    done = trace("import", tmp_path / "x.bin", "-o", tmp_path / "x.npz")
    assert done.code == 0
    assert done.err == f"warning: {tmp_path}/x.bin: 1 requests of 0 bytes left out\n"

"""The comparison: what is asked for, what is refused before anything runs, and what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tiered_mem import compare
from tiered_mem.bounds import bounds
from tiered_mem.cli import invoke
from tiered_mem.compare import AUTO, plan
from tiered_mem.compare_options import parse_machine, split_list
from tiered_mem.errors import ConfigError, PolicyError, TieredMemError, TraceError
from tiered_mem.simulate import LinkSpeed, Machine, simulate
from tiered_mem.trace import Form, Trace, TraceHeader

LAYERS, TOKENS, TOP_K, EXPERTS = 3, 16, 2, 16
BLOCK = 1 << 20
MACHINE = Machine(nvme=LinkSpeed(3e9, 80e-6), hbm=LinkSpeed(50e9), compute=300e9)


def make_trace(seed: int = 0, **columns: Any) -> Trace:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, EXPERTS + 1)
    events = [
        rng.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum())
        for _ in range(TOKENS * LAYERS)
    ]
    header = TraceHeader(
        form=Form.EVENTS,
        model="tiny",
        num_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        expert_nbytes=(BLOCK,) * LAYERS,
    )
    index = np.concatenate(events)
    return Trace.from_rows(
        header,
        index=index,
        nbytes=np.full(len(index), BLOCK),
        step=np.repeat(np.arange(TOKENS), LAYERS * TOP_K),
        layer=np.tile(np.repeat(np.arange(LAYERS), TOP_K), TOKENS),
        **columns,
    )


def save(trace: Trace, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    trace.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    return save(make_trace(), folder / "tiny.npz")


@pytest.fixture(scope="module")
def foreseeing(folder: Path) -> Path:
    """A trace with recorded predictions of the next layer's gate."""
    num_events = TOKENS * LAYERS
    offset = np.arange(num_events + 1, dtype=np.uint32)
    ahead = np.zeros(num_events, np.uint32)
    return save(make_trace(1, ahead_offset=offset, ahead_index=ahead), folder / "foreseeing.npz")


@pytest.fixture(scope="module")
def flat(folder: Path) -> Path:
    """A trace of single requests, which have no layers."""
    index = np.random.default_rng(2).zipf(1.5, 300) % 32
    header = TraceHeader(form=Form.REQUESTS)
    return save(Trace.from_rows(header, index=index, nbytes=np.full(300, BLOCK)), folder / "f.npz")


def plan_tiny(path: Path, **changes: Any) -> compare.Comparison:
    wanted: dict[str, Any] = {"eviction": ["lru"], "prefetch": ["none"], "hbm": ["25%"]}
    return plan([path], **(wanted | {"machine": MACHINE} | changes))


# --- what people write ---


def test_commas_in_parentheses_do_not_cut() -> None:
    assert split_list("lru, per-layer(lfu),oracle(0.8,2)") == [
        "lru",
        "per-layer(lfu)",
        "oracle(0.8,2)",
    ]
    assert split_list("a(b(c,d),e),f") == ["a(b(c,d),e)", "f"]


@pytest.mark.parametrize("text", ["", "lru,", ",lru", "lru,,arc", "a(b", "a)b(", "a(b))"])
def test_a_broken_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing at one|don't match"):
        split_list(text)


def test_links_have_a_bandwidth_and_maybe_a_latency() -> None:
    machine = parse_machine("hbm=50GB/s, nvme = 3GiB/s : 80us", "300GB/s")
    assert machine == Machine(LinkSpeed(3 * 2**30, 80e-6), LinkSpeed(50e9, 0.0), 300e9)
    # What isn't said is as by default.
    assert parse_machine("nvme=1GB/s:0.5ms", "1TB/s") == Machine(
        LinkSpeed(1e9, 0.5e-3), LinkSpeed(50e9, 10e-6), 1e12
    )


@pytest.mark.parametrize(
    ("links", "told"),
    [
        ("pcie=3GB/s", "no link"),
        ("3GB/s", "no link"),
        ("hbm=3", "no rate"),
        ("hbm=3GB", "no rate"),
        ("hbm=0GB/s", "no rate"),
        ("hbm=-3GB/s", "no rate"),
        ("hbm=25%/s", "no rate"),
        ("hbm=3GB/s:", "no latency"),
        ("hbm=3GB/s:80", "no latency"),
        ("hbm=3GB/s:-1us", "no latency"),
        ("hbm=3GB/s:9999999s", "no latency"),
        ("hbm=3GB/s,hbm=4GB/s", "twice"),
    ],
)
def test_what_is_no_link_is_refused(links: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_machine(links, "300GB/s")


# --- the plan ---


def test_every_combination_is_run_once(tiny: Path, flat: Path) -> None:
    plans = plan(
        [tiny, flat, tiny],
        eviction=["lru", "fifo", "lru"],
        prefetch=["none"],
        hbm=["25%", "50%", 12 * BLOCK, "12MiB"],
        machine=MACHINE,
    )
    budgets = {"tiny": {"25%", "50%"}, "f": {"25%", "50%", str(12 * BLOCK)}}
    assert [(j.place.trace, j.place.hbm, j.eviction) for j in plans.jobs if j.eviction] == [
        (name, text, eviction)
        for name, texts in budgets.items()
        for text in sorted(texts, key=["25%", "50%", str(12 * BLOCK)].index)
        for eviction in ("lru", "fifo")
    ]
    assert sum(not job.eviction for job in plans.jobs) == 5  # bounds, one a place
    assert [trace["name"] for trace in plans.traces] == ["tiny", "f"]


def test_shares_are_of_all_experts_whether_used_or_not(tiny: Path) -> None:
    (_, job) = plan_tiny(tiny, hbm=["25%"]).jobs
    assert job.place.hbm_nbytes == LAYERS * EXPERTS * BLOCK // 4


def test_traces_of_one_name_are_told_apart(tiny: Path, folder: Path) -> None:
    other = save(make_trace(3), folder / "other" / "tiny.npz")
    wanted: dict[str, Any] = {"eviction": ["lru"], "prefetch": ["none"], "hbm": ["25%"]}
    plans = plan([tiny, other], **wanted, machine=MACHINE)
    assert [trace["name"] for trace in plans.traces] == [str(tiny), str(other)]


def test_auto_is_what_the_trace_can_drive(tiny: Path, foreseeing: Path, flat: Path) -> None:
    def predictors(path: Path, *prefetch: str) -> list[str]:
        jobs = plan_tiny(path, prefetch=prefetch).jobs
        return [job.prefetch for job in jobs if job.eviction]

    simple = predictors(tiny, AUTO)
    assert simple[0] == "none"
    assert {"previous-token", "frequency", "transition"} <= set(simple)
    assert not {"next-gate", "learned", "hash-exact", "oracle"} & set(simple)
    assert set(predictors(foreseeing, AUTO)) == {*simple, "next-gate"}
    assert predictors(flat, AUTO) == ["none"]
    assert set(predictors(tiny, "oracle(1)", AUTO)) == {*simple, "oracle(1)"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown policy": ({"eviction": ["lru", "magic"]}, "'magic'"),
    "unknown predictor": ({"prefetch": ["none", "magic"]}, "'magic'"),
    "predictor without its record": ({"prefetch": ["next-gate"]}, "tiny can't run"),
    "predictor without its record, beside auto": ({"prefetch": [AUTO, "learned"]}, "learned"),
    "no table": ({"prefetch": ["hash-exact"]}, "hash-exact"),
    "oracle's recall": ({"prefetch": ["oracle(2)"]}, "recall"),
    "oracle's lookahead": ({"prefetch": [f"oracle(1,{LAYERS + 1})"]}, "lookahead"),
    "budget below a block": ({"hbm": ["50%", "1%"]}, "hbm=1%"),
    "no budget": ({"hbm": ["0"]}, "hbm=0"),
    "no size": ({"hbm": ["5Q"]}, "not a size: '5Q'"),
    "dram": ({"dram": "much"}, "not a size: 'much'"),
    "nothing to run": ({"eviction": []}, "at least one eviction"),
}


@pytest.mark.parametrize(("changes", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_before_any_run(
    tiny: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_tiny(tiny, **changes)
    assert told in str(caught.value)


def test_flat_traces_have_no_predictors(flat: Path) -> None:
    with pytest.raises(ConfigError, match="no layers to predict"):
        plan_tiny(flat, prefetch=["previous-token"])


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("not one")
    with pytest.raises(TraceError, match=r"x\.npz"):
        plan_tiny(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        plan_tiny(tmp_path / "missing.npz")


# --- the runs ---


def test_results_are_those_of_the_simulator_on_any_number_of_processes(tiny: Path) -> None:
    wanted = plan_tiny(
        tiny,
        eviction=["lru", "per-layer(lru)"],
        prefetch=["none", "oracle(0.8,2)"],
        hbm=["25%", "50%"],
    )
    alone = wanted.run(num_processes=1)
    seen: list[tuple[int, int]] = []
    together = wanted.run(num_processes=2, progress=lambda done, total: seen.append((done, total)))
    assert together["runs"] == alone["runs"]
    assert seen == [(i, 10) for i in range(1, 11)]
    trace = Trace.load(tiny)
    for run in alone["runs"]:
        hbm = run["hbm_nbytes"]
        expected = simulate(
            trace, hbm=hbm, eviction=run["eviction"], prefetch=run["prefetch"], machine=MACHINE
        ).as_dict()
        assert {name: run[name] for name in expected} == expected
        assert run["bounds"] == bounds(trace, hbm=hbm, machine=MACHINE).as_dict()
    assert [(r["eviction"], r["prefetch"], r["hbm"]) for r in alone["runs"]] == [
        (eviction, prefetch, hbm)
        for hbm in ("25%", "50%")
        for prefetch in ("none", "oracle(0.8,2)")
        for eviction in ("lru", "per-layer(lru)")
    ]
    assert alone["traces"][0]["nbytes"] == trace.total_nbytes
    assert alone["traces"][0]["info"]["num_accesses"] == trace.num_accesses
    assert alone["links"]["nvme"] == {"bytes_per_second": 3e9, "latency": 80e-6}
    json.dumps(alone, allow_nan=False)


def test_a_failing_run_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, eviction: str, **__: Any) -> Any:
        raise PolicyError("it returned 5") if eviction == "fifo" else ZeroDivisionError

    monkeypatch.setattr(compare, "simulate", fail)
    name = "trace tiny, hbm 25%, eviction fifo, prefetch none"
    with pytest.raises(PolicyError, match=f"{name}: it returned 5"):
        plan_tiny(tiny, eviction=["fifo"]).run(num_processes=1)
    with pytest.raises(ZeroDivisionError) as caught:
        plan_tiny(tiny, eviction=["lru"]).run(num_processes=1)
    assert caught.value.__notes__ == ["in the run of " + name.replace("fifo", "lru")]


def test_a_dying_process_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_leave_interrupts_to_the_parent", _die)
    with pytest.raises(TieredMemError, match=r"trace tiny, .*fewer processes"):
        plan_tiny(tiny).run(num_processes=2)


def _die() -> None:
    os._exit(3)


# --- the command ---


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], tiny: Path) -> Callable[..., Done]:
    """Runs `tiered-mem compare` on the tiny trace in this process."""

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        code = invoke(["compare", str(tiny), *map(str, arguments)])
        return Done(code, *capfd.readouterr())

    return run


def test_the_command_writes_a_report(command: Callable[..., Done], tmp_path: Path) -> None:
    target = tmp_path / "my report"
    options = ["--eviction", "lru,per-layer(fifo)", "--prefetch", "none,oracle(0.8,2)"]
    options += ["--hbm", "25%,50%", "--dram", "10%", "--link", "nvme=1GB/s:80us"]
    done = command(*options, "-j", "1", "-o", target)
    assert (done.code, done.err) == (0, "")
    assert str(target / "index.html") in done.out
    assert {path.name for path in target.iterdir()} == {
        "index.html",
        "plots",
        "results.json",
        "runs.csv",
    }
    results = json.loads((target / "results.json").read_text())
    assert len(results["runs"]) == 8
    assert {run["dram_nbytes"] for run in results["runs"]} == {
        round(LAYERS * EXPERTS * BLOCK * 0.1)
    }
    assert results["links"]["nvme"] == {"bytes_per_second": 1e9, "latency": 80e-6}
    made_by = results["command"]
    assert made_by.startswith("tiered-mem compare ")
    assert "--prefetch 'none,oracle(0.8,2)'" in made_by
    assert "--compute 300GB/s" in made_by  # defaults are written out
    assert made_by.endswith(f"-o '{target}'")


def test_a_report_is_replaced_by_force_alone(command: Callable[..., Done], tmp_path: Path) -> None:
    target = tmp_path / "report"
    options = ["--eviction", "lru", "--prefetch", "none", "-j", "1", "-o", target]
    assert command(*options, "--hbm", "25%").code == 0
    done = command(*options, "--hbm", "50%")
    assert done.code == 2
    assert done.err == (
        f"tiered-mem: {target} holds a report: add --force to replace it, or name another\n"
    )
    assert command(*options, "--hbm", "50%", "--force").code == 0
    results = json.loads((target / "results.json").read_text())
    assert [run["hbm"] for run in results["runs"]] == ["50%"]
    assert os.listdir(tmp_path) == ["report"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--eviction", "lru,magic"], "magic"),
        (["--eviction", "per-layer(lru"], "don't match"),
        (["--prefetch", "next-gate"], "next-gate"),
        (["--hbm", "0", "--eviction", "lru"], "hbm=0"),
        (["--link", "usb=3GB/s"], "usb"),
        (["--compute", "fast"], "no rate"),
        (["--jobs", "-1"], "--jobs"),
        (["--fast"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: Callable[..., Done], tmp_path: Path, options: list[str], told: str
) -> None:
    done = command(*options, "-o", tmp_path / "a" / "report")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("tiered-mem: ")
    assert told in line
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import contextlib, os, signal, sys
from tiered_mem.cli import main, output

def interrupt(done, total):
    if done == 3:
        os.killpg(0, signal.SIGINT)

output.count_bar = lambda what: contextlib.nullcontext(interrupt)
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def test_an_interrupt_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    reports = tmp_path / "reports"
    budgets = ",".join(f"{n}%" for n in range(10, 90))  # enough that most runs are left
    arguments = ["compare", tiny, "--eviction", "lru", "--hbm", budgets, "-j", "2"]
    done = subprocess.run(
        [sys.executable, script, *arguments, "-o", reports / "r"],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert list(reports.iterdir()) == []

"""What lies in examples/ runs as it says."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiered_mem.policies.prefetch import Decision, make_predictor
from tiny_traces import PAGE, machine_of, trace_of

from tiered_mem import plugins
from tiered_mem.policy import resolve_eviction
from tiered_mem.simulate import simulate

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_policy_of_ones_own_keeps_what_is_used_again() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "my_policy.py"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    rates = {
        line.split()[0]: float(line.split()[1].rstrip("%")) for line in done.stdout.splitlines()
    }
    assert rates["belady"] >= rates["lru-2"] > rates["lru"] > 0


def test_a_policy_of_ones_own_is_short() -> None:
    source = (EXAMPLES / "my_policy.py").read_text()
    policy = source.partition("class Lru2")[2].partition("\n\n\n")[0]
    assert len(policy.splitlines()) <= 30


def test_a_policy_of_ones_own_decides_by_the_use_before_the_last() -> None:
    policy = runpy.run_path(str(EXAMPLES / "my_policy.py"))["Lru2"]()
    for key in (1, 2, 3):
        policy.insert(key, PAGE)
    for key in (1, 2, 2, 1):
        policy.touch(key)  # used before the last: 1 at 4, 2 at 5, 3 never
    assert policy.evict(lambda key: True, None) == 3
    assert policy.evict(lambda key: True, None) == 1
    assert policy.evict(lambda key: key != 2, None) is None
    policy.erase(2)
    assert policy.evict(lambda key: True, None) is None


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the package as pip would: its module on the path, and what it says of itself."""
    project = tomllib.loads((EXAMPLES / "plugin" / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"].items()
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in entries.items())
            for group, entries in groups
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES / "plugin")
    yield
    sys.modules.pop("tiered_mem_example", None)


def test_the_package_is_found(plugin: None) -> None:
    assert plugins.names() == ["mru", "same-ids"]
    assert "tiered_mem_example" not in sys.modules
    listed = [(found.name, found.kind, found.error) for found in plugins.list_plugins()]
    assert listed == [("mru", "eviction", ""), ("same-ids", "prefetch", "")]
    assert all(found.summary and found.source for found in plugins.list_plugins())


def test_its_policy_runs_by_name(plugin: None) -> None:
    cycle = trace_of([(i % 5,) for i in range(50)])

    def hits(eviction: str) -> int:
        return simulate(cycle, hbm=4 * PAGE, eviction=eviction, machine=machine_of()).num_hits

    assert hits("lru") == 0
    assert hits("mru") == hits("belady") > 30
    assert resolve_eviction("per-layer(mru)") == "per-layer(mru)"
    assert hits("per-layer(mru)") == hits("mru")


def test_its_predictor_runs_by_name(plugin: None) -> None:
    route = Decision(layer=0, next_layer=1, ids=[5, 2, 9], num_experts=8, top_k=2)
    assert make_predictor("same-ids").predict(route) == [5, 2]
    trace = trace_of([(i // 2 % 5,) for i in range(50)], num_layers=2)
    run = simulate(trace, hbm=4 * PAGE, prefetch="same-ids", machine=machine_of())
    assert run.num_hints > 0

"""What every eviction policy must keep to, whatever it ranks by."""

from __future__ import annotations

import random
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from blocks import PAGE, expert
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from test_core_residency import PLAIN, SPECS, ResidencyMachine

from tiered_mem import _core

ROOT = Path(__file__).parent.parent
NUM_SLOTS = [1, 2, 8, 64]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the policies' C++ program can't be built")
    target = tmp_path_factory.mktemp("policies") / "policies"
    flags = ["-std=c++17", "-O1", "-D_GLIBCXX_ASSERTIONS"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'policies'}"]
    sources = [str(ROOT / "tests" / "cpp" / "policies.cpp"), str(ROOT / "csrc" / "policy.cpp")]
    subprocess.run(["g++", *flags, *includes, *sources, "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("spec", SPECS)
def test_random_calls_keep_the_contract(program: Path, spec: str) -> None:
    """Victims are resident and may go, none is missed or lost, ghosts are bounded, and so on."""
    done = subprocess.run([program, spec], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def requests(num_requests: int, num_layers: int = 4, num_experts: int = 40) -> list[int]:
    """Keys of which few are asked for often, in bursts."""
    rng = random.Random(3)
    keys = []
    for step in range(num_requests):
        index = min(int(rng.paretovariate(0.8)), num_experts) - 1
        keys.append(expert(step % num_layers, (index + step // 500) % num_experts))
    return keys


def misses_of_residency(keys: list[int], num_slots: int, spec: str) -> int:
    residency = _core.Residency(num_slots * PAGE, spec)
    misses = 0
    for key in keys:
        residency.begin_event(key)
        if residency.find(key) is None:
            status, victims = residency.admit([key], [PAGE])
            assert status == "ok"
            assert len(victims) <= 1
            residency.mark_ready(key)
            misses += 1
        else:
            residency.use(key)
        assert len(residency) <= num_slots
    return misses


@pytest.mark.parametrize("spec", SPECS)
def test_misses_are_within_what_is_possible(spec: str) -> None:
    keys = requests(3000)
    array = np.array(keys, np.uint64)
    counts = {n: _core.count_misses(spec, array, n) for n in [*NUM_SLOTS, 160]}
    assert counts[1] == 1 + sum(a != b for a, b in pairwise(keys))  # there is no choice
    assert counts[160] == len(set(keys))  # nor here
    assert len(keys) >= counts[2] >= counts[8] > counts[64] > len(set(keys))


@pytest.mark.parametrize("num_slots", NUM_SLOTS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_tier_misses_as_often_as_the_policy_alone(spec: str, num_slots: int) -> None:
    keys = requests(1500)
    alone = _core.count_misses(spec, np.array(keys, np.uint64), num_slots)
    assert misses_of_residency(keys, num_slots, spec) == alone


@pytest.mark.parametrize("spec", PLAIN)
def test_any_sequence_of_calls_to_a_tier(spec: str) -> None:
    machine = type("Machine", (ResidencyMachine,), {"eviction": spec})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=10, stateful_step_count=30, deadline=None, derandomize=True),
    )

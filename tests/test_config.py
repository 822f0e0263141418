"""Sizes as people write them, and the budgets made of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tiered_mem import cgroup
from tiered_mem.config import (
    Budgets,
    BudgetWarning,
    WorkingSet,
    format_size,
    headroom,
    memory_to_spare,
    parse_size,
)
from tiered_mem.errors import BudgetError, ConfigError

GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the machine's memory: `machine(total, available)`."""

    def set_memory(total: int, available: int) -> None:
        memory = SimpleNamespace(total=total, available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(cgroup, "memory_left", lambda: None)

    set_memory(64 * GIB, 40 * GIB)
    return set_memory


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("6GiB", 6 * GIB),
        ("6 gib", 6 * GIB),
        (" 500MB ", 500_000_000),
        ("1.5KiB", 1536),
        (".5kb", 500),
        ("2.TB", 2 * 10**12),
        ("9007199254740993", 2**53 + 1),  # more digits than a double has
        ("25%", 250),
        ("150%", 1500),
        ("0.1%", 1),
    ],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    assert parse_size(size, whole=1000) == nbytes


@pytest.mark.parametrize(
    "size",
    [
        *("", " ", "GiB", "%", "-1", "-1GiB", "1..5GiB", "1e9", "6 G i B", "6Gib/s", "6XB", "auto"),
        *("0x10", "1,5GiB", "inf", "nan", "9" * 400, "9" * 10_000 + "GiB", "9999999999TiB"),
        *(-1, 2**63, 10**5000, True, 1.5, None, b"6GiB", [6]),
    ],
    ids=lambda size: repr(size)[:20] if not isinstance(size, int) else f"{type(size)}",
)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(ConfigError):
        parse_size(size, whole=1000)


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(ConfigError, match="share of nothing"):
        parse_size("25%")
    with pytest.raises(ConfigError, match="share of nothing"):
        Budgets.resolve("25%", 0, whole=0)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (6 * GIB, "6.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def test_what_leaves_the_machine_room(machine: Any) -> None:
    assert memory_to_spare() == int(40 * GIB - 6.4 * GIB)
    machine(8 * GIB, 4 * GIB)
    assert memory_to_spare() == 3 * GIB
    machine(8 * GIB, GIB // 2)
    assert (memory_to_spare(), headroom()) == (0, -GIB // 2)


def test_a_control_groups_limit_counts_as_the_machine_does(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for left, headroom_nbytes in ((None, 33.6), (99, 33.6), (10, 3.6), (0, -6.4)):
        nbytes = None if left is None else left * GIB
        monkeypatch.setattr(cgroup, "memory_left", lambda nbytes=nbytes: nbytes)
        assert headroom() == int(headroom_nbytes * GIB)


def test_what_a_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_MOUNT", tmp_path)
    monkeypatch.setattr(cgroup, "_MEMBERSHIP", tmp_path / "membership")
    assert cgroup.memory_left() is None
    (tmp_path / "membership").write_text("4:memory:/old\n")
    assert cgroup.memory_left() is None
    (tmp_path / "membership").write_text("4:memory:/old\n0::/slice/box\n")
    assert cgroup.memory_left() is None
    for group, limit, current in (("slice", "9000", 2000), ("slice/box", "max", 1500)):
        (tmp_path / group).mkdir()
        (tmp_path / group / "memory.max").write_text(f"{limit}\n")
        (tmp_path / group / "memory.current").write_text(f"{current}\n")
        stat = "anon 900\nactive_file 300\ninactive_file 200\n"
        (tmp_path / group / "memory.stat").write_text(stat)
    assert cgroup.memory_left() == 9000 - (2000 - 500)
    (tmp_path / "slice/box/memory.max").write_text("1100\n")
    assert cgroup.memory_left() == 1100 - (1500 - 500)


def test_auto_takes_what_is_useful_and_leaves_room(machine: Any) -> None:
    spare = memory_to_spare()
    assert Budgets.resolve("auto", "auto", whole=10 * GIB) == Budgets(10 * GIB, 0, True, True)
    assert Budgets.resolve("auto", "auto", whole=99 * GIB) == Budgets(spare, 0, True, True)
    assert Budgets.resolve("auto", 5 * GIB, whole=99 * GIB).hbm == spare - 5 * GIB
    assert Budgets.resolve(4 * GIB, "auto", whole=10 * GIB) == Budgets(
        4 * GIB, 6 * GIB, False, True
    )
    assert Budgets.resolve(4 * GIB, "auto", whole=99 * GIB).dram == spare - 4 * GIB
    assert Budgets.resolve("50%", "25%", whole=8 * GIB) == Budgets(4 * GIB, 2 * GIB)
    machine(8 * GIB, GIB // 2)
    with pytest.raises(BudgetError, match="no byte"):
        Budgets.resolve("auto", "auto", whole=GIB)


@pytest.mark.parametrize(
    ("hbm", "dram", "message"),
    [
        (0, 0, "above zero"),
        ("0%", 0, "above zero"),
        (65 * GIB, 0, r"hbm is 65\.0 GiB, more than the 64\.0 GiB"),
        (GIB, 65 * GIB, r"dram is 65\.0 GiB"),
        (40 * GIB, 40 * GIB, r"together are 80\.0 GiB"),
        (2**63 - 1, 2**63 - 1, "more than"),
    ],
)
def test_budgets_that_cant_be_had(machine: Any, hbm: Any, dram: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budgets.resolve(hbm, dram, whole=GIB)


def test_budgets_that_dont_fit_the_model() -> None:
    budgets = Budgets(hbm=1000, dram=0)
    with pytest.raises(BudgetError, match=r"1001 bytes"):
        budgets.check(WorkingSet(9000, 4000, event_nbytes=1001), "lru")
    with pytest.warns(BudgetWarning, match=r"1001 bytes.*per-layer\(fifo\)"):
        budgets.check(WorkingSet(9000, 1001, event_nbytes=1000), "fifo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budgets.check(WorkingSet(9000, 1000, event_nbytes=1000), "lru")
        budgets.check(WorkingSet(9000, 1001, event_nbytes=1000), "per-layer(lru)")
        budgets.check(WorkingSet(9000, 4000, event_nbytes=1000), "lru", warn=False)

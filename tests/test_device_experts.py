"""Experts computed from the slot pool, as on a GPU, with host memory for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import conformance
import families
import pytest
import torch
from adapter import Saved

from tiered_mem.device import portable
from tiered_mem.hf import grouped, pool, wrap
from tiered_mem.hf.device import Home, Way
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.pool import Window, group, window_views

pytestmark = pytest.mark.filterwarnings("ignore::tiered_mem.BudgetWarning")

TAKING_PART = [name for name in families.families() if name not in families.LEFT_OUT]
VARIED = ["qwen3_moe", "nemotron_h", "gpt_oss", "ernie4_5_vl_moe", "deepseek_v4", "qwen4_exp"]
SLOT = 8192


# --- windows ---


def anywhere(address: int) -> tuple[int, int]:
    return 0, 1 << 60


def test_slots_in_order_make_one_window_in_that_order() -> None:
    slots = [4096 + i * SLOT for i in range(100)]
    found = group(slots, SLOT, anywhere)
    assert found == ([Window(4096, 100)], list(range(100)))
    assert group(slots[::-1], SLOT, anywhere).of_slot == list(range(99, -1, -1))


def test_windows_hold_fewer_groups_than_torch_takes() -> None:
    slots = [i * SLOT for i in range(0, 3000, 2)]
    found = group(slots, SLOT, anywhere)
    assert [w.num_slots for w in found.windows] == [1023, 1023, 951]
    for slot, number in zip(slots, found.of_slot, strict=True):
        assert address_of(found, number) == slot


def test_windows_are_of_one_phase_and_one_piece_of_memory() -> None:
    piece = 10 * SLOT
    slots = [i * piece + phase + j * SLOT for i in range(3) for phase in (0, 4096) for j in (1, 4)]
    found = group(slots, SLOT, lambda a: (a // piece * piece, a // piece * piece + piece))
    assert len(found.windows) == 6
    assert all(w.num_slots == 4 for w in found.windows)
    assert [address_of(found, number) for number in found.of_slot] == slots


def address_of(groups: pool.Groups, number: int) -> int:
    for window in groups.windows:
        if number < window.num_slots:
            return window.start + number * SLOT
        number -= window.num_slots
    raise AssertionError("beyond the last window")


def test_views_of_a_window_are_the_fields_of_its_slots() -> None:
    layout = ExpertLayout.build(
        4, {"up_proj": ((3, 16), torch.bfloat16), "bias": ((3,), torch.float32)}
    )
    memory = torch.randint(0, 256, (5 * layout.slot_nbytes,), dtype=torch.uint8)
    start = layout.slot_nbytes
    views = window_views(layout, Window(start, 3), lambda a, n: memory[a : a + n])
    for i in range(3):
        one = layout.views(memory[start + i * layout.slot_nbytes :])
        for name, tensor in one.items():
            assert torch.equal(views[name][i].view(torch.uint8), tensor.view(torch.uint8))
            assert views[name][i].data_ptr() == tensor.data_ptr()


def test_rows_are_sorted_by_group_and_nobodys_come_last() -> None:
    ids = torch.tensor([5, 1, 9, 1, 0, 5])
    table = torch.tensor([3, 0, 3, 3, 3, 2, 3], dtype=torch.int32)  # experts 0 to 5, and nobody
    rows = grouped.sort_rows(ids, table, 3)
    assert rows.order.tolist() == [1, 3, 0, 5, 2, 4]
    assert rows.groups.tolist() == [0, 0, 2, 2, 3, 3]
    assert rows.ends.tolist() == [2, 2, 4] and rows.ends.dtype == torch.int32


# --- models ---


@contextmanager
def pretending(
    monkeypatch: pytest.MonkeyPatch, way: Way | None = None, most: int = pool.MOST_GROUPS
) -> Iterator[None]:
    """Load models to a pretended accelerator: torch's portable backend over host memory.

    `way`: how experts that aren't eager compute there; `most` slots to a window.
    """
    with monkeypatch.context() as patch:
        patch.setattr(wrap, "usable", lambda _: portable.pretended())
        patch.setattr("tiered_mem.hf.experts.MOST_GROUPS", most)
        if way is not None:
            patch.setattr(
                Home, "way", lambda self, dtype, nbytes, eager: Way.EAGER if eager else way
            )
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved.make("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.mark.parametrize("name", TAKING_PART)
def test_every_family_computes_from_the_pool(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = conformance.ask(*families.build(name))
    expected.model.save_pretrained(tmp_path)
    with (
        pretending(monkeypatch, Way.GROUPED, most=2),
        conformance.on_tiers(tmp_path, expected) as model,
    ):
        assert model.tiered_mem.home.uses_pool
        run = conformance.compare(model, expected)
    assert run.difference < conformance.TOLERANCE
    assert run.same_tokens
    assert run.num_waves > run.num_calls and run.stats.num_evictions > 0
    assert run.stats.num_failed == run.stats.num_repaired == 0

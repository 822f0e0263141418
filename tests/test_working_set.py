"""What a model asks of the budgets."""

from __future__ import annotations

import families
import pytest
import torch

from tiered_mem.config import BudgetWarning
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.top_k import find_top_k
from tiered_mem.hf.working_set import working_set

LAYOUT = ExpertLayout.build(8, {"weight": ((64, 32), torch.float32)})


@pytest.mark.parametrize("name", families.families())
def test_the_top_k_of_every_family_is_found(name: str) -> None:
    special = families.SPECIAL.get(name, {}).get("num_experts_per_tok", families.TOP_K)
    assert find_top_k(families.tiny_config(name)) == special


def test_the_largest_top_k_of_a_list_counts() -> None:
    config = families.tiny_config("hunyuan_v1_moe")
    config.moe_topk = [1, 3, 2]
    needs = working_set([LAYOUT, LAYOUT], config)
    assert needs.event_nbytes == 3 * LAYOUT.slot_nbytes
    assert needs.cycle_nbytes == 6 * LAYOUT.slot_nbytes


def test_an_unknown_top_k_counts_as_one_and_is_told() -> None:
    config = families.tiny_config("switch_transformers")
    with pytest.warns(BudgetWarning, match="'switch_transformers' doesn't say how many"):
        needs = working_set([LAYOUT], config)
    assert needs.event_nbytes == LAYOUT.slot_nbytes

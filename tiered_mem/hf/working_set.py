"""What a model asks of the budgets, from its config and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiered_mem.config import WorkingSet
from tiered_mem.hf.layout import ExpertLayout

# What configs call the number of experts a token uses.
_TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")


def working_set(layouts: Sequence[ExpertLayout], config: Any) -> WorkingSet:
    """Return the working set of a model whose layers have `layouts`.

    Where its config has no name we know for top-k, it is counted as 1: a lower bound.
    """
    text = config.get_text_config()
    values = [getattr(text, name, None) for name in _TOP_K_NAMES]
    top_k = next((value for value in values if isinstance(value, int)), 1)
    return WorkingSet(
        experts_nbytes=sum(layout.num_experts * layout.slot_nbytes for layout in layouts),
        cycle_nbytes=sum(layout.slot_nbytes * top_k for layout in layouts),
        event_nbytes=max(layout.slot_nbytes for layout in layouts) * top_k,
    )

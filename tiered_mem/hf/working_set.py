"""What a model asks of the budgets, from its config and layouts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from tiered_mem.config import BudgetWarning, WorkingSet
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.top_k import find_top_k


def working_set(layouts: Sequence[ExpertLayout], config: Any) -> WorkingSet:
    """Return the working set of a model whose layers have `layouts`.

    Where its config has no name we know for top-k, it is counted as 1, a lower bound, and a
    `BudgetWarning` says so.
    """
    top_k = find_top_k(config)
    if top_k is None:
        warnings.warn(
            f"the config of {config.model_type!r} doesn't say how many experts a token uses: "
            "budgets are checked for 1, so give more than the least they ask for",
            BudgetWarning,
            stacklevel=3,
        )
        top_k = 1
    return WorkingSet(
        experts_nbytes=sum(layout.num_experts * layout.slot_nbytes for layout in layouts),
        cycle_nbytes=sum(layout.slot_nbytes * top_k for layout in layouts),
        event_nbytes=max(layout.slot_nbytes for layout in layouts) * top_k,
    )


def examine_checkpoint(path_or_id: str | os.PathLike[str]) -> WorkingSet:
    """Return what a checkpoint asks of the budgets, from its config and file headers.

    Raises what `Checkpoint.open` raises.
    """
    with Checkpoint.open(path_or_id) as checkpoint:
        return working_set(checkpoint.layouts, checkpoint.config)

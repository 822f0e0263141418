"""tiered-mem: a memory runtime for models larger than the GPU.

`from_pretrained` loads a Mixture-of-Experts checkpoint whose experts lie in HBM, DRAM and NVMe;
`offload` does it to a model in memory. Both need torch and transformers, which are imported on
first use; `Runtime` and `Store` don't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiered_mem.config import Budgets, BudgetWarning, parse_size
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.runtime import Runtime
from tiered_mem.stats import Stats
from tiered_mem.store import Store

if TYPE_CHECKING:
    from tiered_mem.hf.handle import TieredModel
    from tiered_mem.hf.wrap import from_pretrained, offload

__version__ = "0.1.0"

__all__ = [
    "BlockKey",
    "BudgetWarning",
    "Budgets",
    "Kind",
    "Runtime",
    "Stats",
    "Store",
    "TieredModel",
    "from_pretrained",
    "offload",
    "parse_size",
]

_LAZY = {"TieredModel", "from_pretrained", "offload"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from tiered_mem.hf import wrap

        return getattr(wrap, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

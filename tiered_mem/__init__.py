"""tiered-mem: a memory runtime for models larger than the GPU.

`from_pretrained` loads a Mixture-of-Experts checkpoint whose experts lie in HBM, DRAM and NVMe;
`offload` does it to a model in memory. `tier_kv` does it to the keys and values of any model. They
need torch and transformers, which are imported on first use; `Runtime` and `Store` don't.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tiered_mem.config import Budgets, BudgetWarning, parse_size
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.runtime import Runtime
from tiered_mem.stats import Stats
from tiered_mem.store import Store

if TYPE_CHECKING:
    from tiered_mem.hf.handle import TieredModel
    from tiered_mem.hf.kv import KvPool, tier_kv
    from tiered_mem.hf.wrap import from_pretrained, offload

__version__ = "0.1.0"

__all__ = [
    "BlockKey",
    "BudgetWarning",
    "Budgets",
    "Kind",
    "KvPool",
    "Runtime",
    "Stats",
    "Store",
    "TieredModel",
    "from_pretrained",
    "offload",
    "parse_size",
    "tier_kv",
]

_LAZY = {
    "KvPool": "kv",
    "TieredModel": "handle",
    "from_pretrained": "wrap",
    "offload": "wrap",
    "tier_kv": "kv",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"tiered_mem.hf.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

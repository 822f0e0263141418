"""How each peer gets the big model ready, and how it is let go of again."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from big_model import BigModel, resident_model
from tiered_mem.policies.prefetch import Predictor

import tiered_mem
from tiered_mem.config import BudgetWarning

UNMODIFIED = "unmodified, all resident"
ACCELERATE = "accelerate.cpu_offload"


def ours(
    big: BigModel,
    device: torch.device,
    *,
    hbm: int | str,
    dram: int | str,
    prefetch: str | Predictor = "none",
) -> Any:
    """Return the model on a runtime, its store the one that is there, its tiers empty."""
    place = {} if device.type == "cpu" else {"device_map": str(device)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)  # small budgets are what is measured
        model = tiered_mem.from_pretrained(
            big.checkpoint,
            hbm=hbm,
            dram=dram,
            nvme=big.store,
            prefetch=prefetch,
            dtype=torch.bfloat16,
            **place,
        )
    return model.eval()


def accelerated(big: BigModel, device: torch.device) -> Any:
    """Return the unmodified model in host memory, its weights copied up as they are needed."""
    from accelerate import cpu_offload

    return cpu_offload(resident_model(big, torch.device("cpu")), execution_device=device)


def measured(
    device: torch.device, make: Callable[[], Any], work: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """Return what `work` finds out about the model that `make` loads, then give all of it back."""
    model = make()
    try:
        return work(model)
    finally:
        if hasattr(model, "tiered_mem"):
            model.tiered_mem.close()
        del model
        release(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more. The caller has dropped its model (and closed it)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

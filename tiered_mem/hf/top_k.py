"""How many experts a token uses, under the names that transformers' families have for it."""

from __future__ import annotations

from typing import Any

TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
    "topk",
)
"""Attributes of configs, routers and blocks."""


def find_top_k(config: Any) -> int | None:
    """Return a model's top-k from its config, the largest if its layers differ; None if unknown."""
    text = config.get_text_config()
    for name in TOP_K_NAMES:
        value = getattr(text, name, None)
        values = value if isinstance(value, list | tuple) else [value]
        known = [k for k in values if isinstance(k, int)]
        if known:
            return max(known)
    return None

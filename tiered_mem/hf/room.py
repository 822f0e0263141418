"""How much device memory to leave beside HBM's slots: what a model's own compute will take.

An estimate, from the config alone, of one prompt and the text that follows it. What it misses comes
out of HBM when it is needed (`low_vram`), so a bad guess costs hits and time, not the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.top_k import find_top_k

#: Tokens of a prompt that one forward takes; a longer one takes more room than is left for it.
PROMPT_TOKENS = 4096
#: Tokens, prompt and answer together, whose keys and values fit.
CONTEXT_TOKENS = 8192
_SPARE = 0.05


@dataclass(frozen=True)
class Room:
    """Bytes to leave free: for the activations of a prompt, and for keys and values."""

    activations: int
    kv: int

    @property
    def nbytes(self) -> int:
        """Return both and 5 %."""
        return int((self.activations + self.kv) * (1 + _SPARE))


def room_for(
    config: Any, layouts: Sequence[ExpertLayout], dtype: torch.dtype, top_k: int | None = None
) -> Room:
    """Return the room for one sequence: a prompt of 4096 tokens in a context of 8192.

    Both are cut to the model's `max_position_embeddings`. Logits are those of the last token, as
    `generate` computes them; attention takes no memory that grows with the prompt's square but a
    mask of one byte. Of a size that the config doesn't name, nothing is counted.

    Args:
        config: of the model; its text part counts.
        layouts: of the layers with experts.
        dtype: of activations, keys and values.
        top_k: experts of a token, where the config doesn't say.
    """
    text = config.get_text_config()
    context = min(CONTEXT_TOKENS, _size(text, "max_position_embeddings") or CONTEXT_TOKENS)
    tokens = min(PROMPT_TOKENS, context)
    k = find_top_k(config) or top_k or 1
    hidden = _size(text, "hidden_size")
    keys, values = _kv_sizes(text)
    num_layers = _size(text, "num_hidden_layers")
    kv_of_layer = context * (keys + values) * dtype.itemsize

    heads = _size(text, "num_attention_heads")
    head_dim = keys // max(1, _size(text, "num_key_value_heads") or heads)
    # Residual and normed states; queries before and after rotation, what attends, its projection.
    attention = 2 * hidden + 3 * heads * head_dim + 2 * (keys + values) + hidden
    # Of each row: its inputs, both projections, the activation between, outputs as they are sorted
    # and as they are weighted; beside the residual and the routed states.
    inner = max((_inner_size(layout) for layout in layouts), default=0)
    experts = 2 * hidden + k * (3 * hidden + 3 * inner)
    dense = 2 * hidden + 3 * _size(text, "intermediate_size")
    activations = tokens * max(attention, experts, dense) * dtype.itemsize
    # The weights of one token's experts are copied for decoding.
    selected = k * max((layout.nbytes for layout in layouts), default=0)
    logits = _size(text, "vocab_size") * (dtype.itemsize + torch.float32.itemsize)
    mask = tokens * context
    return Room(
        activations=max(activations, selected) + logits + mask,
        # A layer's cache grows by being copied to a larger place.
        kv=kv_of_layer * (num_layers + 1),
    )


def _kv_sizes(text: Any) -> tuple[int, int]:
    """Elements of a token's keys and of its values in one layer's cache."""
    heads = _size(text, "num_attention_heads")
    if _size(text, "kv_lora_rank"):  # latent attention: transformers caches what it expands to
        rope, nope = _size(text, "qk_rope_head_dim"), _size(text, "qk_nope_head_dim")
        return heads * (nope + rope), heads * _size(text, "v_head_dim")
    kv_heads = _size(text, "num_key_value_heads") or heads
    head_dim = _size(text, "head_dim") or _size(text, "hidden_size") // max(1, heads)
    return kv_heads * head_dim, kv_heads * head_dim


def _inner_size(layout: ExpertLayout) -> int:
    """Elements of a row between an expert's projections, before the gate about twice as many."""
    down = [field for field in layout.fields if field.name == "down_proj" and len(field.shape) == 2]
    return min(down[0].shape) if down else 0


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, list | tuple):
        value = max((v for v in value if isinstance(v, int)), default=0)
    return value if isinstance(value, int) else 0

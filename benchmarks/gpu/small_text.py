"""A prompt for the big model, and the text that it makes of it, on its own routes."""

from __future__ import annotations

from typing import Any

import torch
from big_model import BigModel

_SEED = 2


def prompt_of(big: BigModel, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Return random token ids [1, num_tokens] on `device`, the same ones every time."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(big.shape.vocab, (1, num_tokens), generator=generator).to(device)


def generate(model: Any, prompt: torch.Tensor, *, num_tokens: int) -> list[int]:
    """Return the tokens that greedy decoding adds to a prompt [1, length]."""
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
    )
    added: list[int] = text[0, prompt.size(1) :].tolist()
    return added

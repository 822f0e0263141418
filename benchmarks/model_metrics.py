"""What a trained Mixture-of-Experts model is worth: losses, use of its experts, text.

`held_out` is always [num_windows, window] token ids; every loss is in nats per predicted token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import one_hot

PROMPTS = (
    "To be, or not to be",
    "In the beginning",
    "KING HENRY.\n",
    "And the LORD said unto Moses",
)


def mean_loss(model: Any, held_out: torch.Tensor, batch_size: int = 16) -> float:
    """Nats per token, the mean over windows of equal length."""
    with torch.inference_mode():
        losses = [model(part, labels=part).loss * len(part) for part in held_out.split(batch_size)]
    return float(sum(losses)) / len(held_out)


def unigram_loss(tokens: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Nats per token of the training frequencies (add one) on the tokens the model predicts."""
    counts = torch.bincount(tokens, minlength=vocab_size).double() + 1
    return -float((counts / counts.sum()).log()[held_out[:, 1:]].mean())


def routes(model: Any, held_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts [layers, windows, window, top_k] and their probability mass [layers]."""
    top_k = model.config.num_experts_per_tok
    chosen, mass = [], []
    with torch.inference_mode():
        for batch in held_out.split(16):
            logits = torch.stack(model(batch, output_router_logits=True).router_logits).float()
            top = logits.softmax(-1).topk(top_k)
            chosen.append(top.indices.view(len(logits), *batch.shape, top_k))
            mass.append(top.values.sum(-1).view(len(logits), *batch.shape))
    return torch.cat(chosen, 1), torch.cat(mass, 1).mean((1, 2))


def expert_spread(model: Any, held_out: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """How the experts of each layer are used on the held-out text.

    entropy: of the use over experts, 1 = even. max_share, min_share: of the busiest and the idlest
    expert, in units of an even share. repeat: share of a token's experts that the token before it
    used too; repeat_by_chance: what independent draws from the layer's use would give. top_k_mass:
    router probability that the chosen experts hold. between_sources: total variation distance
    between the uses on the first two sources (0 = the same experts, 1 = disjoint ones).
    """
    num_experts = model.config.num_experts
    measured = {name: routes(model, part) for name, part in held_out.items()}
    chosen = torch.cat([chosen for chosen, _ in measured.values()], 1)
    spread = []
    for layer, picks in enumerate(chosen):
        used = one_hot(picks, num_experts).sum(-2)  # [windows, window, experts], 0 or 1
        top_k = picks.shape[-1]
        use = used.double().mean((0, 1)) / top_k
        entropy = -(use * use.clamp_min(1e-12).log()).sum() / math.log(num_experts)
        by_source = [
            one_hot(source[layer], num_experts).double().mean((0, 1, 2))
            for source, _ in measured.values()
        ][:2]
        figures = {
            "entropy": entropy,
            "max_share": use.max() * num_experts,
            "min_share": use.min() * num_experts,
            "repeat": (used[:, 1:] & used[:, :-1]).sum(-1).double().mean() / top_k,
            "repeat_by_chance": use.square().sum() * top_k,
            "top_k_mass": sum(mass[layer] * part.shape[1] for part, mass in measured.values())
            / chosen.shape[1],
            "between_sources": (by_source[0] - by_source[-1]).abs().sum() / 2,
        }
        spread.append({"layer": layer} | {name: round(float(x), 4) for name, x in figures.items()})
    return spread


def sample_text(model: Any, tokenizer: Any, num_tokens: int = 60) -> list[dict[str, str]]:
    """Greedy and sampled continuations of the prompts, seeded."""
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "temperature 0.8": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    }
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        texts = {"prompt": prompt}
        for name, options in ways.items():
            torch.manual_seed(0)
            output = model.generate(**inputs, max_new_tokens=num_tokens, **options)
            texts[name] = tokenizer.decode(output[0], skip_special_tokens=True)
        samples.append(texts)
    return samples


def report(metrics: dict[str, Any]) -> None:
    validation = metrics["validation"]
    print("validation {loss:.3f}, unigram {unigram_loss:.3f} {unit}".format(**validation))
    names = [name for name in metrics["experts"][0] if name != "layer"]
    print("layer  " + "  ".join(names))
    for row in metrics["experts"]:
        print(f"{row['layer']:5d}  " + "  ".join(f"{row[n]:{len(n)}.3f}" for n in names))
    for texts in metrics["samples"]:
        for name in ("greedy", "temperature 0.8"):
            print(f"--- {name}\n{texts[name]}")

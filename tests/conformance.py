"""Every family's tiny model with its experts on tiers too small for them, beside the same model in
memory.

`test_families.py` asserts what is measured here, and `python tests/conformance.py docs/families.md`
writes it down as a table.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import families
import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel

import tiered_mem
from tiered_mem.hf.detect import ExpertsModule, find_experts
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.stats import Stats

TOLERANCE = 1e-6
HBM_SLOTS = 3  # the prompt needs more experts in each layer: its events run in waves
DRAM_SLOTS = 4
NUM_TOKENS = 5

# Their eager experts add up in float32 whatever the dtype. The `tiered_eager` function adds in the
# model's dtype, as the other families do: only in half precision can that be told apart.
EAGER_IN_FLOAT32 = {"inkling2", "nemotron_h", "openai_privacy_filter"}


class Answer(NamedTuple):
    """A model in memory, what it was asked and what it answered."""

    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    tokens: torch.Tensor

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot that any of the model's experts fits into."""
        modules = [experts.module for experts in find_experts(self.model)]
        return max(ExpertLayout.of_module(module).slot_nbytes for module in modules)


class Run(NamedTuple):
    """A model on tiers compared with the model in memory."""

    difference: float  # the largest between two logits
    same_tokens: bool
    num_calls: int  # of experts modules, to compute the logits
    num_waves: int  # in which those calls ran
    stats: Stats  # of logits and tokens together
    report: dict[int, str]  # how each layer is predicted, or why it isn't


class Conformance(NamedTuple):
    """What was found of one family."""

    layout: str  # in words
    experts_class: str
    published: str  # how its own checkpoints hold experts
    by_default: Run  # from the published form
    from_memory_form: Run  # from a checkpoint in the form that the model has in memory
    like_eager: Run  # adding as eager does, with next-gate prefetch and twice the HBM


def ask(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Answer:
    logits = families.logits(model, inputs)
    return Answer(model, inputs, logits, families.greedy(model, inputs, NUM_TOKENS))


@contextmanager
def on_tiers(checkpoint: Path, expected: Answer, **options: Any) -> Iterator[PreTrainedModel]:
    """Load a checkpoint with its experts on a few slots, and close it afterwards."""
    few: dict[str, Any] = {
        "hbm": HBM_SLOTS * expected.slot_nbytes,
        "dram": DRAM_SLOTS * expected.slot_nbytes,
        "prefetch": "none",
        "dtype": torch.float32,
    }
    model = tiered_mem.from_pretrained(
        checkpoint, model_class=type(expected.model), **(few | options)
    )
    try:
        yield model
    finally:
        model.tiered_mem.close()


def compare(model: PreTrainedModel, expected: Answer) -> Run:
    """Ask a model that has just been put on tiers the same."""
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    hooks = [e.module.register_forward_pre_hook(count) for e in find_experts(model)]
    logits = families.logits(model, expected.inputs)
    for hook in hooks:
        hook.remove()
    num_waves = model.tiered_mem.stats().num_events
    tokens = families.greedy(model, expected.inputs, NUM_TOKENS)
    return Run(
        difference=(logits - expected.logits).abs().max().item(),
        same_tokens=torch.equal(tokens, expected.tokens),
        num_calls=num_calls,
        num_waves=num_waves,
        stats=model.tiered_mem.stats(),
        report=model.tiered_mem.prefetch_report()["notes"],
    )


def measure(name: str, folder: Path) -> Conformance:
    """Run a family from both forms of checkpoint, which are written to `folder`."""
    expected = ask(*families.build(name))
    original, in_memory = families.save_both_ways(expected.model, folder)
    with on_tiers(original, expected) as model:
        by_default = compare(model, expected)
    with on_tiers(in_memory, expected) as model:
        from_memory_form = compare(model, expected)
    hbm = 2 * HBM_SLOTS * expected.slot_nbytes
    options = {"experts_implementation": "eager", "prefetch": "next-gate", "hbm": hbm}
    with on_tiers(original, expected, **options) as model:
        like_eager = compare(model, expected)
    experts = find_experts(expected.model)
    return Conformance(
        layout=_layout(experts),
        experts_class=type(experts[0].module).__name__,
        published=_published(original, in_memory),
        by_default=by_default,
        from_memory_form=from_memory_form,
        like_eager=like_eager,
    )


# --- the table ---

_INTRODUCTION = """\
# Families

Every model family of transformers {version} that has the experts interface, each as a tiny random
model. Written by `python tests/conformance.py docs/families.md`; `tests/test_families.py` asserts
the same for every family.

{hbm} experts fit in HBM (for *eager* {twice}) and {dram} in DRAM, the others are on NVMe. So every
layer of the prompt runs in waves, and experts are evicted all the time. Compared is the same model
in memory with eager experts, in float32. Each family is loaded from a checkpoint in its published
form and from one in the form that it has in memory.

- **largest difference** of any logit: *default* adds a token's experts up as transformers' default
  `grouped_mm` does, *eager* (`experts_implementation="eager"`) as its eager loop does. It must stay
  below {tolerance:.0e}. What there is comes from rounding: rows in another order, or weights at
  another alignment in memory, which plain `from_pretrained` shows too and which varies.
- **tokens**: the greedy ones (the best label where a model doesn't generate token by token) are
  equal in all runs.
- **next-gate**: layers whose router prefetch runs ahead, of those that have a layer before them.
  "exact" ones are routed by token id.

A model that doesn't generate text (`openai_privacy_filter`) needs `model_class=`.

In bfloat16 and float16 logits are bitwise those of the unmodified model with the same
`experts_implementation`. With `"eager"` that doesn't hold for {float32}:
their own eager loops add up in float32, ours in the model's dtype. Unmodified `deepseek_v4` doesn't
run in float16. All of this holds for one number of torch threads: on several, torch splits sums
differently.

"""
_COLUMNS = (
    *("family", "experts class", "weights of an expert", "published checkpoint"),
    *("default", "eager", "tokens", "next-gate"),
)

_LEFT_OUT = """
## Left out

These families keep their experts outside transformers' experts interface, so nothing can supply
them one by one. `from_pretrained` and `offload` refuse them by name before anything is read.

"""


def table() -> Iterator[str]:
    """Yield the page in pieces, measuring every family on the way."""
    yield _INTRODUCTION.format(
        version=transformers.__version__,
        hbm=HBM_SLOTS,
        twice=2 * HBM_SLOTS,
        dram=DRAM_SLOTS,
        tolerance=TOLERANCE,
        float32=", ".join(f"`{name}`" for name in sorted(EAGER_IN_FLOAT32)),
    )
    yield _head(*_COLUMNS)
    for name in families.families():
        if name not in families.LEFT_OUT:
            with tempfile.TemporaryDirectory() as folder:
                yield _row(*_cells(name, measure(name, Path(folder))))
    yield _LEFT_OUT
    yield _head("family", "experts class", "why")
    for name in families.OUTSIDE:
        classes = {type(m).__name__ for m in families.build_outside(name).modules()}
        (found,) = (c for c in classes if re.search(r"Experts$|CDMoE$", c))
        yield _row(name, found, families.WHY_OUTSIDE[name])
    for name, reason in families.LEFT_OUT.items():
        yield _row(name, "", reason)


def _head(*columns: str) -> str:
    return _row(*columns) + "|---" * len(columns) + "|\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cells(name: str, found: Conformance) -> Iterator[str]:
    runs = (found.by_default, found.from_memory_form, found.like_eager)
    yield from (name, found.experts_class, found.layout, found.published)
    for difference in (max(run.difference for run in runs[:2]), found.like_eager.difference):
        yield f"{difference:.1e}" if difference else "0"
    yield "equal" if all(run.same_tokens for run in runs) else "**different**"
    yield _prefetch(found.like_eager.report)


def _prefetch(report: dict[int, str]) -> str:
    exact = sum(note.startswith("exact") for note in report.values())
    ahead = sum(note.startswith("next-gate") for note in report.values())
    reasons = {note.removeprefix("off: ") for note in report.values() if note.startswith("off")}
    reasons.discard("no layer comes before it")
    text = f"{ahead} of {len(report) - max(exact, 1)}" + (f" + {exact} exact" if exact else "")
    return "; ".join([text, *sorted(reasons)])


def _layout(experts: list[ExpertsModule]) -> str:
    module: Any = experts[0].module
    notes = []
    if not module.has_gate:
        notes.append("no gate")
    elif not module.is_concatenated:
        notes.append("gate and up interleaved")
    else:
        notes.append("gate and up fused")
    notes += ["transposed"] * module.is_transposed + ["biases"] * module.has_bias
    notes += ["norm after each expert"] * module.has_post_expert_norm
    if len({ExpertLayout.of_module(m).nbytes for _, m, _ in experts}) > 1:
        notes.append("two experts modules a layer, of different sizes")
    if len({layer for *_, layer in experts}) < len(experts):
        notes.append("shared by encoder and decoder")
    return ", ".join(notes)


def _published(original: Path, in_memory: Path) -> str:
    keys, memory_keys = _keys(original), _keys(in_memory)
    if any(re.search(r"\.\d+\.", key.rpartition("experts")[2]) for key in keys if "experts" in key):
        return "a tensor per expert"
    return "as in memory" if keys == memory_keys else "fused, under other names"


def _keys(folder: Path) -> set[str]:
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            keys |= set(opened.keys())
    return keys


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    page = "".join(table())
    Path(sys.argv[1]).write_text(page)

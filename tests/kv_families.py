"""Tiered KV on a tiny random model of every family that can be one: `python kv_families.py OUT`.

The families are those of transformers itself whose modeling file has a causal language model with
transformers' cache. Every block goes through NVMe: HBM holds fewer than one step needs.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import families
import torch
import transformers
from transformers import PreTrainedModel

import tiered_mem
from tiered_mem.errors import BudgetError, UnsupportedModelError

BLOCK_TOKENS = 4
HBM_NBYTES = 3 * 4096  # a block of 4 tokens takes a page
MOST_DIFFERENCE = 1e-5
_OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "output_logits": True}
_OPTIONS |= {"return_dict_in_generate": True, "min_new_tokens": 12}

# Families of whom no tiny text model is built or runs here, unmodified.
NO_MODEL = {
    "bamba": "its cache has no attention layer among three",
    "blenderbot": "its decoder wants a list of towers",
    "blt": "has models inside, without a tiny size",
    "cohere_compass": "layers of two models in one list",
    "csm": "generates audio from two models",
    "dbrx": "clamps by a limit that a tiny config lacks",
    "diffusion_gemma": "generates blocks of tokens by diffusion",
    "gemma3n": "its layers come in groups of fixed sizes",
    "kosmos2": "wants an image",
    "moonshine": "wants audio",
    "moonshine_streaming": "wants audio",
    "moshi": "generates audio",
    "mpt": "generates without a cache unless told to",
    "musicgen": "generates audio",
    "musicgen_melody": "generates audio",
    "openai_privacy_filter": "labels tokens, generates none",
    "pp_formulanet": "wants an image",
    "qwen3_5": "its cache has no attention layer among three",
    "xmod": "wants a language to be set",
    "zamba": "shares weights between layers of fixed numbers",
    "zamba2": "shares weights between layers of fixed numbers",
}


# Families that the tests go through: what differs in how they attend. The table has every one.
TESTED = (
    *("apertus", "bitnet", "cohere", "diffllama", "exaone4", "gemma", "gemma2", "gemma3"),
    *("glm4", "llama", "minicpm3", "mistral", "nemotron", "olmo2", "phi", "phi3", "qwen2"),
    *("qwen3", "smollm3", "stablelm"),
    # with experts
    *("aria", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"),
    *("ernie4_5_moe", "gemma4", "glm4_moe", "gpt_oss", "granitemoehybrid", "jamba", "kimi_linear"),
    *("lfm2_moe", "minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "qwen3_moe"),
    *("qwen3_next", "qwen3_vl_moe", "qwen4_exp"),
)


class Outcome(NamedTuple):
    """How tiered KV did: `refusal` says why there was none."""

    difference: float = 0.0  # the largest of any logit
    same_tokens: bool = True
    num_gathered: int = 0
    num_tiered: int = 0
    num_layers: int = 0
    num_reads: int = 0
    refusal: str = ""


@cache
def names() -> list[str]:
    models = Path(transformers.__file__).parent / "models"
    found = set(families.families())
    for source in models.glob("*/modeling_*.py"):
        text = source.read_text()
        own = source.name == f"modeling_{source.parent.name}.py"
        if own and "ForCausalLM" in text and "past_key_values.update" in text:
            found.add(source.parent.name)
    return sorted(found - NO_MODEL.keys())


def build(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A family's model, with a layer that attends to everything if it can have one."""
    config = families.tiny_config(name)
    text = config.get_text_config(decoder=True)
    kinds = list(getattr(text, "layer_types", None) or [])
    if set(kinds) == {"sliding_attention"}:
        text.layer_types = [*kinds[:-1], "full_attention"]
    elif not kinds and getattr(text, "sliding_window", None):
        text.sliding_window = None
    torch.manual_seed(0)
    model = families.model_class(name)._from_config(config, dtype=torch.float32)
    families._randomise(model.eval())
    tokens = torch.randint(3, families.VOCABULARY, (2, 12))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name == "ernie4_5_vl_moe":
        inputs["moe_mm_token_type_ids"] = (torch.arange(12) % 4 == 1).int().expand(2, 12)
    return model, inputs


def try_family(name: str) -> Outcome:
    model, inputs = build(name)
    want = model.generate(**inputs, **_OPTIONS, do_sample=False)
    try:
        return _try(model, inputs, want, HBM_NBYTES)
    except BudgetError:  # latent attention has as many heads as queries have
        return _try(model, inputs, want, 64 * HBM_NBYTES)
    except UnsupportedModelError as error:
        return Outcome(refusal=str(error))


def _try(model: PreTrainedModel, inputs: dict[str, Any], want: Any, hbm: int) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attention that can't be replaced: in the table
        tiered_mem.tier_kv(model, hbm, block_tokens=BLOCK_TOKENS)
    pool = model.tiered_mem
    try:
        # Not given by hand: mpt computes something else with any cache that is.
        make, caches = pool.cache, []
        pool.cache = lambda prompt: caches.append(make(prompt)) or caches[-1]
        got = model.generate(**inputs, **_OPTIONS, do_sample=False)
        cache = caches[0]
        pairs = zip(got.logits, want.logits, strict=True)
        return Outcome(
            difference=max(float((a - b).abs().max()) for a, b in pairs),
            same_tokens=torch.equal(got.sequences, want.sequences),
            num_gathered=cache.num_gathered,
            num_tiered=cache.num_tiered,
            num_layers=len(cache.layers),
            num_reads=pool.stats().num_nvme_reads,
        )
    finally:
        pool.close()
        del model.tiered_mem


def write_table(path: Path) -> None:
    """Write what `try_family` says of every family."""
    rows, refused = [], []
    for name in names():
        print(name, flush=True)
        try:
            outcome = try_family(name)
        except Exception as error:
            print("  ", type(error).__name__, str(error)[:200])
            continue
        if outcome.refusal:
            refused.append(f"| {name} | {_short(outcome.refusal)} |")
            continue
        difference = f"{outcome.difference:.1e}" if outcome.difference else "0"
        tokens = "equal" if outcome.same_tokens else "DIFFERENT"
        way = "layers put together" if outcome.num_gathered else "blocks"
        tiered = f"{outcome.num_tiered} of {outcome.num_layers}"
        rows.append(f"| {name} | {tiered} | {way} | {difference} | {tokens} |")
    left_out = [f"| {name} | {reason} |" for name, reason in NO_MODEL.items()]
    path.write_text(
        _TEXT.format(
            version=transformers.__version__,
            num=len(rows),
            rows="\n".join(rows),
            refused="\n".join(refused),
            left_out="\n".join(left_out),
        )
    )


def _short(refusal: str) -> str:
    return refusal.split(": load it")[0].split("; load it")[0].split(") ", 1)[-1]


_TEXT = """# Tiered KV by family

Every family of transformers {version} with a causal language model on transformers' cache, each as
a tiny random model: {num} of them. Written by `python tests/kv_families.py docs/kv_families.md`;
`tests/test_kv_families.py` asserts the same of some forty that differ in how they attend.

Two sequences of 24 tokens in blocks of 4, HBM for 3 blocks (for a
few families with large ones, 768 KiB), no DRAM: every block goes through NVMe.
Compared is the same model with its own cache, in float32.

- **tiered layers**: those that keep all keys and values. Sliding windows, recurrent states and
  compressed pools stay where transformers has them.
- **attention**: over *blocks* as they arrive; or by the model's own code, for which one layer at a
  time is *put together* in memory at every step.
- **largest difference** of any logit: below 1e-5.

| family | tiered layers | attention | largest difference | tokens |
|---|---|---|---|---|
{rows}

## Refused

| family | why |
|---|---|
{refused}

## Without a tiny model

| family | why |
|---|---|
{left_out}
"""

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write_table(Path(sys.argv[1]))

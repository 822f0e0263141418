"""The random Qwen3-MoE that the benchmarks run: real shapes, no training, made once and kept.

A model as its config initialises it routes almost every token alike: attention over many tokens
averages to one direction, which drowns the tiny embeddings, and an LRU of a quarter of the experts
hits 97 % of the time on uniformly random tokens. So the embeddings are scaled up, and the experts'
down projections too, so that the residual stream belongs to the token and still changes from layer
to layer. Measured on 120 random tokens of `FULL`: consecutive tokens share 13 % of their experts
(chance is 12.5 %), an LRU of a quarter hits 24 %, and the next layer's gate on this layer's
residual stream finds 60 to 80 % of the next experts (published for trained models: 79 to 89 %).
That is the worst case for a cache, and the same for every peer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a random Qwen3-MoE; the name is the folder it is kept in."""

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    vocab: int

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert in bfloat16: gate, up and down projections."""
        return 3 * self.hidden * self.intermediate * 2

    @property
    def experts_nbytes(self) -> int:
        return self.num_layers * self.num_experts * self.expert_nbytes

    def config(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=4 * self.intermediate,
            moe_intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.hidden // self.num_heads,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )


# 768 experts of 1.77 MB, 170 MB of them a token; 1.45 GB in all. The vocabulary is small so that
# the head, which no peer offloads, does not hide what is measured.
FULL = Shape("qwen3-moe-1.4gb", 12, 64, 8, 768, 384, 12, 4, 16384)
SMOKE = Shape("qwen3-moe-smoke", 3, 8, 2, 64, 32, 4, 2, 256)


SHAPES = {"full": FULL, "smoke": SMOKE}

_TOKENIZER = Path(__file__).parent / "models" / "tiny-moe" / "tokenizer.json"

EMBEDDING_STD = 1.0
DOWN_SCALE = 30.0


def default_work_dir() -> Path:
    """Where models and stores are kept between runs: large files, outside the repository."""
    return Path(tempfile.gettempdir()) / "tiered-mem-benchmarks"


def random_model(shape: Shape, work_dir: Path, *, seed: int = 0) -> Path:
    """The folder of a bfloat16 checkpoint of ``shape``, written now or by an earlier run.

    A folder made from other sizes or another seed is replaced, and so is one half-written by a
    killed run: it has no ``made_from.json``.
    """
    folder = work_dir / shape.name
    recipe = {"seed": seed, "embedding_std": EMBEDDING_STD, "down_scale": DOWN_SCALE}
    made_from = json.dumps(asdict(shape) | recipe, sort_keys=True)
    mark = folder / "made_from.json"
    if mark.exists() and mark.read_text() == made_from:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3MoeForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)
    spread_routes(model)
    model.save_pretrained(folder)
    _please_airllm(folder, shape)
    mark.write_text(made_from)
    return folder


def _please_airllm(folder: Path, shape: Shape) -> None:
    """Add what airllm and the transformers 4 under it want; nobody else looks at it."""
    shutil.copy(_TOKENIZER, folder)
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = shape.num_experts  # transformers 5 writes num_local_experts
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def spread_routes(model: Qwen3MoeForCausalLM) -> None:
    """Scale weights in place so that tokens take different routes (see the top of this file)."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(EMBEDDING_STD / model.config.initializer_range)
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(DOWN_SCALE)


def random_tokens(shape: Shape, num_tokens: int, *, seed: int) -> list[int]:
    """Uniform token ids: a random model's own greedy text repeats itself and flatters a cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab, (num_tokens,), generator=generator).tolist()

"""One tiny random model for every transformers family that carries the experts interface.

The families are found in transformers itself (every modeling file that decorates a class with
`@use_experts_implementation`), so the family of a new release turns up here by itself. Its config
is made from `TINY` wherever it has such a field; what a family needs beyond that stands in
`SPECIAL`, and a family that cannot take part stands in `LEFT_OUT` with its reason.

Experts are random and distinct and routers are random too, so one wrong expert shows in the logits.
"""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

NUM_EXPERTS = 8
TOP_K = 2
VOCABULARY = 64

# Every name a family has for a size, and its tiny value. A config takes those it has a field for.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "dense_intermediate_size": 24,
    "prefix_dense_intermediate_size": 24,
    "moe_intermediate_size": 16,
    "moe_hidden_size": 24,
    "out_hidden_size": 16,
    "projector_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # 4 beside kv_lora_rank: latent attention has as many as heads
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "initializer_range": 0.1,
    # experts
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # latent and indexed attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # linear attention and state-space layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    # no special token outside the vocabulary, and none that ends the text early
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# The same for the other towers of a multimodal family, which only see text here.
TINY_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "encoder_ffn_dim": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "encoder_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": TOP_K,
    "num_local_experts": NUM_EXPERTS,
    "image_size": 32,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "output_dim": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "max_position_embeddings": 32,
    "deepstack_visual_indexes": [0],
    "projection_intermediate_size": 16,
    "projection_hidden_dim": 16,
    "output_channels": 16,
    "downsample_hidden_size": 16,
    "mel_vocab_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

_INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "rel_extent": 16,
    "d_rel": 4,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}

# Families that keep their experts outside the interface, and what they need beyond TINY.
OUTSIDE: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "doge": {"is_moe": True, "num_experts": 16},
    "jetmoe": {"kv_channels": 8},
    "llama4": {
        "intermediate_size_mlp": 16,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
    },
    "longcat_flash": {"num_layers": 1, "ffn_hidden_size": 16, "expert_ffn_hidden_size": 16},
    "nllb_moe": {
        "d_model": 32,
        **{f"{tower}_layers": 2 for tower in ("encoder", "decoder")},
        **{f"{tower}_ffn_dim": 16 for tower in ("encoder", "decoder")},
        **{f"{tower}_attention_heads": 2 for tower in ("encoder", "decoder")},
        **{f"{tower}_sparse_step": 1 for tower in ("encoder", "decoder")},
    },
    "step3p7": {"share_expert_dim": 16, "num_sliding_attention_heads": 4},
    "switch_transformers": {"d_model": 32, "d_ff": 16, "d_kv": 8, "num_layers": 2},
}

# How each of them runs its experts instead.
WHY_OUTSIDE = {
    "dbrx": "a loop of its own cuts each expert's rows out of one matrix of all",
    "doge": "its experts are single rows of embedding tables, looked up by product keys",
    "jetmoe": "a loop of its own runs every expert, chosen or not; attention has experts too",
    "llama4": "every expert computes every token (one batched matmul), so none can be absent",
    "longcat_flash": "a loop of its own, in which some experts are the identity without weights",
    "nllb_moe": "a dictionary of one module per expert, called one by one",
    "step3p7": "a loop of its own over the fused weights, never handed to the interface",
    "switch_transformers": "a dictionary of one module per expert, called one by one",
}

# What a family needs beyond TINY in its text config.
SPECIAL: dict[str, dict[str, Any]] = OUTSIDE | {
    "bailing_hybrid": _HYBRID,
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "dots3_note": {
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
        "head_dim": 16,
        **{f"swa_{key}": 4 for key in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{key}": 16 for key in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{key}": 8 for key in ("qk_nope_head_dim", "v_head_dim")},
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "diffusion_gemma": {
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
        "hc_mult": 2,
    },
    "granitemoehybrid": _HYBRID,
    "inkling": _INKLING,
    "inkling2": _INKLING,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "kimi_linear": _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_groups": 2,
        "use_mamba_kernels": False,
    },
    "openai_privacy_filter": {"initializer_range": 0.05},  # its head is no output embedding
    "qwen3_5_moe": _HYBRID,
    "qwen3_next": _HYBRID,
    # with n-gram tables and indexed attention: all that this family has besides experts
    "qwen4_exp": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
        "eos_token_id": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "initializer_range": 0.3},
}

# What a family needs beyond TINY_TOWER in its other towers.
SPECIAL_TOWERS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4},
    },
    "deepseek_ocr2": {"downsample_channels": [16, 16]},
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
        }
    },
    "unlimited_ocr": {"downsample_channels": [16, 16], "mlp_dim": 16},
}

# What a multimodal family's own config needs beside its sub-configs.
SPECIAL_TOP: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe": {"vision_start_token_id": 60},  # read by generate, absent from the class
}

# The model class, where it is not the module's first ...ForCausalLM or ...ForConditionalGeneration.
CLASSES = {
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}

# Families that cannot take part, each with the reason in one line. None so far.
LEFT_OUT: dict[str, str] = {}


@cache
def families() -> list[str]:
    """Names of the modeling modules that decorate a class with `@use_experts_implementation`.

    The source is searched instead of imported: importing every model takes minutes.
    """
    models = Path(transformers.__file__).parent / "models"
    sources = sorted(models.glob("*/modeling_*.py"))
    return [p.parent.name for p in sources if "@use_experts_implementation" in p.read_text()]


def model_class(name: str) -> type[PreTrainedModel]:
    """The text-only causal language model of a family, else the whole multimodal one."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    candidates = [CLASSES[name]] if name in CLASSES else []
    for suffix in ("ForCausalLM", "ForConditionalGeneration"):
        candidates += [attribute for attribute in module.__all__ if attribute.endswith(suffix)]
    if not candidates:
        raise LookupError(f"{name}: no language model in its modeling module; name one in CLASSES")
    model_class: type[PreTrainedModel] = getattr(module, candidates[0])
    return model_class


def tiny_config(name: str) -> PreTrainedConfig:
    """The family's config with every size tiny."""
    return _text_config(model_class(name).config_class, name)


def _text_config(config_class: type[PreTrainedConfig], name: str) -> PreTrainedConfig:
    values = _known(config_class, TINY)
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    towers = {key: _tower(config_class, key, name) for key in config_class.sub_configs}
    is_text = not any("text" in key for key in towers)
    values |= (SPECIAL if is_text else SPECIAL_TOP).get(name, {})
    return config_class(**(values | towers))


def _tower(parent: type[PreTrainedConfig], key: str, name: str) -> PreTrainedConfig:
    if "text" in key:
        return _text_config(parent.sub_configs[key], name)
    config_class = parent.sub_configs[key]
    if config_class is AutoConfig:
        config_class = CONFIG_MAPPING[parent.sub_configs_defaults[key].model_type]
    special = SPECIAL_TOWERS.get(name, {})
    values = _known(config_class, TINY_TOWER | special) | special.get(key, {})
    return config_class(
        **values, **{k: _tower(config_class, k, name) for k in config_class.sub_configs}
    )


def _known(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(config_class)}
    return {key: value for key, value in values.items() if key in fields}


def find_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module that carries the experts interface, by its path in the model."""
    return {n: m for n, m in model.named_modules() if hasattr(type(m), "_apply_gate")}


def build(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A random float32 model of a family, experts eager, and the inputs of its forward.

    Raises LookupError for a family whose model the tiny sizes do not fit.
    """
    torch.manual_seed(0)
    try:
        config = tiny_config(name)
        model = model_class(name)._from_config(
            config, experts_implementation="eager", dtype=torch.float32
        )
    except Exception as error:
        raise LookupError(
            f"{name}: no tiny model of this family: add what it needs to SPECIAL, "
            "or a reason to LEFT_OUT, in tests/families.py"
        ) from error
    _randomise(model.eval())
    tokens = torch.randint(3, VOCABULARY, (2, 12))
    inputs = {"input_ids": tokens}
    if name == "diffusion_gemma":  # an encoder of the prompt and a decoder of the canvas
        inputs["decoder_input_ids"] = tokens.flip(0)
    if name == "ernie4_5_vl_moe":  # vision tokens have experts of their own
        inputs["moe_mm_token_type_ids"] = (torch.arange(12) % 4 == 1).int().expand(2, 12)
    return model, inputs


def build_outside(name: str) -> PreTrainedModel:
    """A random model of a family that keeps its experts outside the interface."""
    return model_class(name)._from_config(tiny_config(name))


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Distinct experts, and nothing left at zero: a zero router sends every token the same way.

    The head is scaled down so that float32 rounding in another order of summation stays below 1e-6
    in the logits, while a wrong expert still moves them by more than 1e-3.
    """
    for module in find_experts(model).values():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.2)
    for key, tensor in model.state_dict().items():
        if tensor.any():
            continue
        if key.endswith("tid2eid"):  # token id -> expert ids
            tensor.random_(0, NUM_EXPERTS)
        elif tensor.is_floating_point():
            tensor.normal_(0.0, 0.02)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight.mul_(0.25)


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = model(**inputs).logits
    return result


@torch.no_grad()
def greedy(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], num_tokens: int = 6
) -> torch.Tensor:
    """Prompt and greedy continuation [batch, length]; a model that does not generate token by token
    gives its best label for each position instead."""
    if not model.can_generate() or "decoder_input_ids" in inputs:
        return logits(model, inputs).argmax(-1)
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return tokens


def save_both_ways(model: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """Checkpoints in the family's published layout and in the layout it has in memory."""
    original, in_memory = folder / "original", folder / "in_memory"
    model.save_pretrained(original, save_original_format=True)
    model.save_pretrained(in_memory, save_original_format=False)
    return original, in_memory

"""Tiny random checkpoints, written by transformers, with weights from numpy so that they are alike everywhere.

Every norm and bias is random, too: one that is left out or put in the wrong place shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY = 199


@dataclass(frozen=True)
class Variant:
    """One architecture with the settings that matter. `published` rewrites config.json into the older spelling."""

    name: str
    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)
    published: bool = False
    shard_size: str = "1GB"
    fused: bool = False  # tensors are written as transformers has them in memory, not as they are published


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_QWEN3_MOE = {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "head_dim": 16}

VARIANTS = (
    Variant("llama2", "LlamaConfig", {"num_key_value_heads": 4}, published=True, shard_size="100KB"),
    Variant("llama3", "LlamaConfig", {"rope_parameters": _LLAMA3}),
    Variant("llama3_published", "LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}, True),
    Variant(
        "llama_linear", "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    Variant(
        "llama_dynamic", "LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    ),
    Variant("llama_yarn", "LlamaConfig", {"rope_parameters": _YARN}, published=True),
    Variant("llama_biased", "LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    Variant("mistral", "MistralConfig", {"sliding_window": 21}, published=True),
    Variant("mistral_full", "MistralConfig", {"sliding_window": None, "head_dim": 8}),
    Variant("qwen2", "Qwen2Config", {"tie_word_embeddings": True}, published=True),
    Variant(
        "qwen2_windows",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "rope_parameters": _YARN},
    ),
    Variant("qwen3", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}, shard_size="100KB"),
    Variant("qwen3_biased", "Qwen3Config", {"head_dim": 16, "attention_bias": True}, published=True),
    Variant("mixtral", "MixtralConfig", {"num_local_experts": 6}, published=True, shard_size="100KB"),
    Variant(
        "mixtral_fused", "MixtralConfig", {"num_local_experts": 4, "sliding_window": 21, "head_dim": 16}, fused=True
    ),
    Variant(
        "qwen3_moe",
        "Qwen3MoeConfig",
        _QWEN3_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2},
        published=True,
    ),
    Variant(
        "qwen3_moe_fused",
        "Qwen3MoeConfig",
        _QWEN3_MOE | {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9},
        fused=True,
    ),
)


def write_checkpoint(
    variant: Variant, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Write a checkpoint and return the transformers model (float32, eager attention) with the same weights."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": None,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, variant.config_class)(**(settings | variant.settings | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    fill_weights(model, np.random.default_rng(seed), dtype)
    layout = {"save_original_format": False} if variant.fused else {}
    model.to(dtype).save_pretrained(folder, max_shard_size=variant.shard_size, **layout)
    model.to(torch.float32)
    if variant.published:
        edit_json(folder / "config.json", _to_published_spelling)
    return model


def fill_weights(model: Any, generator: np.random.Generator, dtype: torch.dtype) -> None:
    """Random values that `dtype` holds exactly; large enough that tokens differ clearly."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = generator.standard_normal(tuple(parameter.shape))
            if name.endswith("norm.weight"):
                values = 1.0 + 0.2 * values
            elif name == "model.embed_tokens.weight":
                values = values * 0.3  # next to what the layers add, so that a tied head does not repeat its input
            elif parameter.dim() >= 2:
                values = values * 1.5 / np.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(values.astype(np.float32)).to(dtype))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def _to_published_spelling(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if "num_local_experts" in config and config["model_type"] != "mixtral":
        config["num_experts"] = config.pop("num_local_experts")

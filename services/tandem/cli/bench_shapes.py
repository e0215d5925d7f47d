"""Shapes of models that are published, as the config.json of a checkpoint. Values only; the weights are somebody's own.

Beginning and end of a text are those of the demo model's tokenizer, which goes with a made checkpoint.
"""

from __future__ import annotations

from typing import Any

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    **_SPECIAL,
}
_QWEN3 = {
    **_QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "sliding_window": None,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    **_SPECIAL,
}
_LLAMA32 = {
    **_LLAMA,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    **_SPECIAL,
}
_QWEN3_MOE = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}


def _sizes(hidden: int, middle: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA,
        **_sizes(128, 320, 2, 4, 2),
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "vocab_size": 4096,
    },
    "tiny-qwen2": {**_QWEN2, **_sizes(128, 320, 2, 4, 2), "vocab_size": 4096},
    "tiny-mixtral": {**_MIXTRAL, **_sizes(128, 96, 2, 4, 2), "vocab_size": 4096},
    "tiny-qwen3-moe": {
        **_QWEN3_MOE,
        **_sizes(128, 320, 2, 4, 2),
        "head_dim": 32,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "vocab_size": 4096,
    },
    "qwen2.5-0.5b": {**_QWEN2, **_sizes(896, 4864, 24, 14, 2)},
    "qwen2.5-1.5b": {**_QWEN2, **_sizes(1536, 8960, 28, 12, 2)},
    "qwen3-0.6b": {**_QWEN3, **_sizes(1024, 3072, 28, 16, 8)},
    "qwen3-1.7b": {**_QWEN3, **_sizes(2048, 6144, 28, 16, 8)},
    "qwen3-30b-a3b": {**_QWEN3_MOE, **_sizes(2048, 6144, 48, 32, 4)},
    "mixtral-8x7b": {**_MIXTRAL, **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3.2-1b": {**_LLAMA32, **_sizes(2048, 8192, 16, 32, 8), "head_dim": 64},
    "llama-3.2-3b": {**_LLAMA32, **_sizes(3072, 8192, 28, 24, 8), "head_dim": 128},
}

"""Which tensors a checkpoint of a spec must hold: published names, and shapes in the checkpoint's own order."""

from __future__ import annotations

import math
import re

from tandem.engine.models.spec import DecoderSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT_HEAD = "lm_head.weight"

# Older checkpoints carry rope's frequencies; they follow from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def is_ignored(name: str) -> bool:
    """Whether a tensor of this name may be in the checkpoint and is not needed."""
    return _IGNORED.fullmatch(name) is not None


def expected_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters. Matrices are [outputs, inputs]. The output head is absent if it is tied."""
    hidden, middle = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not spec.tied_embeddings:
        shapes[OUTPUT_HEAD] = (spec.vocab_size, hidden)
    matrices = (
        ("self_attn.q_proj", queries, hidden, spec.qkv_bias),
        ("self_attn.k_proj", keys, hidden, spec.qkv_bias),
        ("self_attn.v_proj", keys, hidden, spec.qkv_bias),
        ("self_attn.o_proj", hidden, queries, spec.output_bias),
        ("mlp.gate_proj", middle, hidden, spec.mlp_bias),
        ("mlp.up_proj", middle, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, middle, spec.mlp_bias),
    )
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if spec.head_norms:
            shapes[prefix + "self_attn.q_norm.weight"] = (spec.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (spec.head_dim,)
        for name, outputs, inputs, has_bias in matrices:
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
    return shapes


def expected_bytes(spec: DecoderSpec, bytes_per_element: int) -> int:
    """Memory that the parameters take in a type of that size."""
    return bytes_per_element * sum(math.prod(shape) for shape in expected_tensors(spec).values())

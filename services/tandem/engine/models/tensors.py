"""Which tensors a checkpoint of a spec must hold: published names, and shapes in the checkpoint's own order."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tandem.engine.models.spec import DecoderSpec, experts_family

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


@dataclass(frozen=True, slots=True)
class ExpertNames:
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """Several published tensors in one, as transformers keeps them in memory, and writes them where it is told to.

    `parts`: published name -> where it is in the tensor, along its first dimensions.
    """

    shape: tuple[int, ...]
    parts: dict[str, tuple[int | slice, ...]]


def router_name(spec: DecoderSpec, layer: int) -> str:
    """The router's matrix [experts, hidden] of a layer with experts."""
    return f"{layer_prefix(layer)}{experts_family(spec.architecture).module}.gate.weight"


def expert_names(spec: DecoderSpec, layer: int, expert: int) -> ExpertNames:
    """One expert's matrices: gate and up [intermediate, hidden], down [hidden, intermediate]."""
    family = experts_family(spec.architecture)
    prefix = f"{layer_prefix(layer)}{family.module}.experts.{expert}."
    return ExpertNames(*(f"{prefix}{name}.weight" for name in (family.gate, family.up, family.down)))


def fused_tensors(spec: DecoderSpec) -> dict[str, FusedTensor]:
    """Names that a checkpoint may have instead of its experts' published ones."""
    if spec.experts is None:
        return {}
    count, middle, hidden = spec.experts.num_experts, spec.experts.intermediate_size, spec.hidden_size
    fused: dict[str, FusedTensor] = {}
    for layer in filter(spec.has_experts, range(spec.num_layers)):
        names = [expert_names(spec, layer, expert) for expert in range(count)]
        gates = {one.gate: (number, slice(0, middle)) for number, one in enumerate(names)}
        ups = {one.up: (number, slice(middle, 2 * middle)) for number, one in enumerate(names)}
        prefix = f"{layer_prefix(layer)}mlp."
        fused[prefix + "experts.gate_up_proj"] = FusedTensor((count, 2 * middle, hidden), {**gates, **ups})
        fused[prefix + "experts.down_proj"] = FusedTensor(
            (count, hidden, middle), {one.down: (number,) for number, one in enumerate(names)}
        )
        if (router := router_name(spec, layer)) != prefix + "gate.weight":
            fused[prefix + "gate.weight"] = FusedTensor((count, hidden), {router: ()})
    return fused


def is_kept_wide(name: str) -> bool:
    """Whether a tensor is float32 whatever the model's type is: norms, and routers, whose choice is all or nothing."""
    return name.endswith(("norm.weight", ".block_sparse_moe.gate.weight", ".mlp.gate.weight"))


def expected_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters. Matrices are [outputs, inputs]. The output head is absent if it is tied."""
    hidden = spec.hidden_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not spec.tied_embeddings:
        shapes[OUTPUT_HEAD] = (spec.vocab_size, hidden)
    matrices = [
        ("self_attn.q_proj", queries, hidden, spec.qkv_bias),
        ("self_attn.k_proj", keys, hidden, spec.qkv_bias),
        ("self_attn.v_proj", keys, hidden, spec.qkv_bias),
        ("self_attn.o_proj", hidden, queries, spec.output_bias),
    ]
    dense = [
        ("mlp.gate_proj", spec.intermediate_size, hidden, spec.mlp_bias),
        ("mlp.up_proj", spec.intermediate_size, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, spec.intermediate_size, spec.mlp_bias),
    ]
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if spec.head_norms:
            shapes[prefix + "self_attn.q_norm.weight"] = (spec.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (spec.head_dim,)
        if spec.has_experts(layer):
            shapes |= _expert_tensors(spec, layer)
        for name, outputs, inputs, has_bias in matrices if spec.has_experts(layer) else matrices + dense:
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
    return shapes


def _expert_tensors(spec: DecoderSpec, layer: int) -> dict[str, tuple[int, ...]]:
    assert spec.experts is not None
    hidden, middle = spec.hidden_size, spec.experts.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {router_name(spec, layer): (spec.experts.num_experts, hidden)}
    for expert in range(spec.experts.num_experts):
        names = expert_names(spec, layer, expert)
        shapes |= {names.gate: (middle, hidden), names.up: (middle, hidden), names.down: (hidden, middle)}
    return shapes


def expected_bytes(spec: DecoderSpec, bytes_per_element: int) -> int:
    """Memory that the parameters take in a type of that size."""
    return sum(
        math.prod(shape) * (4 if is_kept_wide(name) else bytes_per_element)
        for name, shape in expected_tensors(spec).items()
    )

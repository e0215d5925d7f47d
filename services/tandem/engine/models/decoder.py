"""The one decoder: built from a spec, its weights and an operator set; it holds no KV and knows no requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tandem.engine.models.rope import inverse_frequencies
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT_HEAD, layer_prefix
from tandem.engine.ops.contract import AttentionShape, HeadNorms, Linear, Operators, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    output: Linear
    middle_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Forward passes over a paged KV pool. Call it in inference mode, from one thread at a time."""

    def __init__(self, spec: DecoderSpec, tensors: Mapping[str, torch.Tensor], operators: Operators) -> None:
        self._spec = spec
        self._operators = operators
        self._embedding = tensors[EMBEDDING]
        self._final_norm = tensors[FINAL_NORM]
        head = self._embedding if spec.tied_embeddings else tensors[OUTPUT_HEAD]
        self._head = operators.linear((head,), (None,))
        self._layers = [self._build_layer(layer, tensors) for layer in range(spec.num_layers)]
        self._shape = AttentionShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            windows=spec.windows,
            frequencies=inverse_frequencies(spec.rope, spec.head_dim).to(self._embedding.device),
            attention_factor=spec.rope.attention_factor,
        )

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

    def forward(self, token_ids: torch.Tensor, batch: TokenBatch, pool: torch.Tensor) -> torch.Tensor:
        """Compute a plan's tokens and store their KV in `pool`.

        token_ids [N] int64 -> residual stream after the last layer [N, hidden] float32, not yet normed.
        """
        operators, epsilon = self._operators, self._spec.norm_epsilon
        step = operators.begin(batch, pool, self._shape)
        residual = operators.embedding(self._embedding, token_ids)
        delta: torch.Tensor | None = None
        for number, layer in enumerate(self._layers):
            normed = operators.rms_norm(residual, delta, layer.input_norm, epsilon)
            queries = step.rope_and_store(number, layer.qkv(normed), layer.head_norms)
            delta = layer.output(step.attend(number, queries))
            normed = operators.rms_norm(residual, delta, layer.middle_norm, epsilon)
            delta = layer.down(operators.gated_silu(layer.gate_up(normed)))
        return residual if delta is None else residual + delta

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """[n, hidden] rows of `forward`'s result -> [n, vocabulary] float32."""
        normed = self._operators.rms_norm(residual, None, self._final_norm, self._spec.norm_epsilon)
        return self._operators.logits(self._head, normed)

    def _build_layer(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> _Layer:
        prefix = layer_prefix(layer)

        def linear(*names: str) -> Linear:
            weights = [tensors[f"{prefix}{name}.weight"] for name in names]
            return self._operators.linear(weights, [tensors.get(f"{prefix}{name}.bias") for name in names])

        head_norms = None
        if self._spec.head_norms:
            head_norms = HeadNorms(
                tensors[prefix + "self_attn.q_norm.weight"],
                tensors[prefix + "self_attn.k_norm.weight"],
                self._spec.norm_epsilon,
            )
        return _Layer(
            input_norm=tensors[prefix + "input_layernorm.weight"],
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            head_norms=head_norms,
            output=linear("self_attn.o_proj"),
            middle_norm=tensors[prefix + "post_attention_layernorm.weight"],
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )

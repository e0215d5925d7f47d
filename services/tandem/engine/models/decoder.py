"""The one decoder: built from a spec, its weights and an operator set; it holds no KV and knows no requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from tandem.engine.models.rope import inverse_frequencies
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT_HEAD,
    expert_names,
    layer_prefix,
    router_name,
)
from tandem.engine.ops.contract import (
    AttentionShape,
    Experts,
    ExpertWeights,
    GatedMlp,
    HeadNorms,
    LayerParts,
    Linear,
    Operators,
    Routing,
    TokenBatch,
)


class Decoder:
    """Forward passes over a paged KV pool. Call it in inference mode, from one thread at a time."""

    def __init__(self, spec: DecoderSpec, tensors: Mapping[str, torch.Tensor], operators: Operators) -> None:
        self._spec = spec
        self._operators = operators
        self._final_norm = tensors[FINAL_NORM]
        if spec.tied_embeddings:
            self._embedding, self._head = operators.tied_embedding(tensors[EMBEDDING])
        else:
            self._embedding = operators.embedding(tensors[EMBEDDING])
            self._head = operators.linear((tensors[OUTPUT_HEAD],), (None,))
        parts = [self._layer_parts(layer, tensors) for layer in range(spec.num_layers)]
        self._layers = operators.layers(parts, spec.norm_epsilon)
        self._shape = AttentionShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            windows=spec.windows,
            frequencies=inverse_frequencies(spec.rope, spec.head_dim).to(self._final_norm.device),
            attention_factor=spec.rope.attention_factor,
        )

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

    def forward(self, token_ids: torch.Tensor, batch: TokenBatch, pool: torch.Tensor) -> torch.Tensor:
        """Compute a plan's tokens and store their KV in `pool`.

        token_ids [N] int64 -> residual stream after the last layer [N, hidden] float32, not yet normed.
        """
        residual = self._embedding(token_ids)
        self._layers(self._operators.begin(batch, pool, self._shape), residual)
        return residual

    def reserve(self, num_tokens: int, pool: torch.Tensor) -> None:
        """Take the workspace of a plan of so many tokens; of `pool` only the shape and type matter."""
        counts = np.arange(num_tokens)
        batch = TokenBatch(
            page_tokens=pool.shape[4],
            offsets=np.array([0, num_tokens]),
            starts=np.array([0]),
            positions=counts,
            slots=np.zeros_like(counts),
            page_table=np.zeros((1, -(-num_tokens // pool.shape[4])), dtype=np.int64),
        )
        self._layers.reserve(self._operators.begin(batch, pool, self._shape), self._spec.hidden_size)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """[n, hidden] rows of `forward`'s result -> [n, vocabulary] float32."""
        normed = self._operators.rms_norm(residual, self._final_norm, self._spec.norm_epsilon)
        return self._operators.logits(self._head, normed)

    def _layer_parts(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> LayerParts:
        prefix = layer_prefix(layer)

        def linear(*names: str, gated: bool = False) -> Linear:
            prepare = self._operators.gated_linear if gated else self._operators.linear
            weights = [tensors[f"{prefix}{name}.weight"] for name in names]
            return prepare(weights, [tensors.get(f"{prefix}{name}.bias") for name in names])

        head_norms = None
        if self._spec.head_norms:
            head_norms = HeadNorms(
                tensors[prefix + "self_attn.q_norm.weight"],
                tensors[prefix + "self_attn.k_norm.weight"],
                self._spec.norm_epsilon,
            )
        return LayerParts(
            input_norm=tensors[prefix + "input_layernorm.weight"],
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            head_norms=head_norms,
            output=linear("self_attn.o_proj"),
            middle_norm=tensors[prefix + "post_attention_layernorm.weight"],
            mlp=self._experts(layer, tensors)
            if self._spec.has_experts(layer)
            else GatedMlp(linear("mlp.gate_proj", "mlp.up_proj", gated=True), linear("mlp.down_proj")),
        )

    def _experts(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> Experts:
        spec = self._spec.experts
        assert spec is not None

        def weights() -> Iterator[ExpertWeights]:
            for expert in range(spec.num_experts):
                names = expert_names(self._spec, layer, expert)
                yield ExpertWeights(tensors[names.gate], tensors[names.up], tensors[names.down])

        routing = Routing(experts_per_token=spec.experts_per_token, normalized=spec.normalized)
        return self._operators.experts(tensors[router_name(self._spec, layer)], weights(), routing)

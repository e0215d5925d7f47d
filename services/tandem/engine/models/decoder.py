"""The one decoder: built from a spec, its weights and an operator set; it holds no KV and knows no requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem.engine.lora.adapters import AdapterRows
from tandem.engine.lora.layers import AdaptedLayers
from tandem.engine.models.part import ModelPart
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
from tandem.engine.ops.composed import ComposedLayers
from tandem.engine.ops.contract import (
    AttentionShape,
    Embedding,
    Experts,
    ExpertWeights,
    GatedMlp,
    HeadNorms,
    LayerParts,
    Linear,
    Operators,
    Reduction,
    Routing,
    TokenBatch,
)
from tandem.engine.ops.sharded import VocabularyEmbedding
from tandem.engine.place import RankPlace


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole model's parameters as they were prepared, but for the embedding."""

    spec: DecoderSpec
    parts: Sequence[LayerParts]
    final_norm: torch.Tensor
    head: Linear
    attention: AttentionShape


class Decoder:
    """Forward passes over a paged KV pool. Call it in inference mode, from one thread at a time.

    One rank's `part` of the model, by default all of it; `reduction` is needed where tensor ranks share it.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        tensors: Mapping[str, torch.Tensor],
        operators: Operators,
        part: ModelPart | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self._spec = spec
        self._operators = operators
        self._part = part or ModelPart(spec, RankPlace())
        self._reduction = reduction
        self._embedding, self._head = self._vocabulary(tensors)
        self._final_norm = tensors[FINAL_NORM] if self._part.has_head else None
        parts = [self._layer_parts(layer, tensors) for layer in self._part.layers]
        self._parts = tuple(parts)
        self._adapted = AdaptedLayers(operators, parts, spec.norm_epsilon)
        if reduction is None:
            self._layers = operators.layers(parts, spec.norm_epsilon)
        else:
            self._layers = ComposedLayers(operators, parts, spec.norm_epsilon, reduction)
        self._shape = AttentionShape(
            num_heads=self._part.num_heads,
            num_kv_heads=self._part.kv.num_heads,
            head_dim=spec.head_dim,
            windows=spec.windows[self._part.layers.start : self._part.layers.stop],
            frequencies=inverse_frequencies(spec.rope, spec.head_dim).to(parts[0].input_norm.device),
            attention_factor=spec.rope.attention_factor,
        )

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._spec.hidden_size

    @property
    def weights(self) -> DecoderWeights:
        """The prepared parameters of this part, for whoever reads them back."""
        assert self._head is not None and self._final_norm is not None, "a part of the model"
        return DecoderWeights(self._spec, self._parts, self._final_norm, self._head, self._shape)

    def forward(
        self, token_ids: torch.Tensor, batch: TokenBatch, pool: torch.Tensor, adapters: Sequence[AdapterRows] = ()
    ) -> torch.Tensor:
        """Compute a plan's tokens, some of them with adapters, and store their KV in `pool`.

        token_ids [N] int64 -> residual stream after the last layer [N, hidden] float32, not yet normed.
        """
        residual = self.embed(token_ids)
        self.run_layers(residual, batch, pool, adapters)
        return residual

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[N] int64 -> residual stream before the first layer [N, hidden] float32. First stage only."""
        assert self._embedding is not None, "this stage has no embedding"
        return self._embedding(token_ids)

    def run_layers(
        self, residual: torch.Tensor, batch: TokenBatch, pool: torch.Tensor, adapters: Sequence[AdapterRows] = ()
    ) -> None:
        """Take `residual` [N, hidden] float32 through this part's layers, in place, and store their KV in `pool`.

        `adapters` only where this part is the whole model.
        """
        step = self._operators.begin(batch, pool, self._shape)
        if adapters:
            self._adapted(step, residual, adapters)
        else:
            self._layers(step, residual)

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
        """[n, hidden] rows of `forward`'s result -> [n, this part's vocabulary] float32. Last stage only."""
        assert self._head is not None and self._final_norm is not None, "this stage has no head"
        normed = self._operators.rms_norm(residual, self._final_norm, self._spec.norm_epsilon)
        return self._operators.logits(self._head, normed)

    def _vocabulary(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Embedding | None, Linear | None]:
        """The table and the head, as far as this part has them; one in memory where both are here and tied."""
        part, operators = self._part, self._operators
        embedding: Embedding | None = None
        head: Linear | None = None
        if part.has_embedding and part.has_head and self._spec.tied_embeddings:
            embedding, head = operators.tied_embedding(tensors[EMBEDDING])
        elif part.has_embedding:
            embedding = operators.embedding(tensors[EMBEDDING])
        if part.has_head and head is None:
            name = EMBEDDING if self._spec.tied_embeddings else OUTPUT_HEAD
            head = operators.linear((tensors[name],), (None,))
        if embedding is not None and self._reduction is not None:
            embedding = VocabularyEmbedding(embedding, part.vocabulary, self._spec.vocab_size, self._reduction)
        return embedding, head

    def _layer_parts(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> LayerParts:
        prefix = layer_prefix(layer)

        def plain(*names: str) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
            weights = [tensors[f"{prefix}{name}.weight"] for name in names]
            return weights, [tensors.get(f"{prefix}{name}.bias") for name in names]

        def linear(*names: str) -> Linear:
            return self._operators.linear(*plain(*names))

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
            else GatedMlp(
                self._operators.gated_linear(*plain("mlp.gate_proj", "mlp.up_proj")), linear("mlp.down_proj")
            ),
        )

    def _experts(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> Experts:
        spec = self._spec.experts
        assert spec is not None
        here = self._part.experts

        def weights() -> Iterator[ExpertWeights]:
            for expert in here:
                names = expert_names(self._spec, layer, expert)
                yield ExpertWeights(tensors[names.gate], tensors[names.up], tensors[names.down])

        routing = Routing(experts_per_token=spec.experts_per_token, normalized=spec.normalized, here=here)
        return self._operators.experts(tensors[router_name(self._spec, layer)], weights(), routing)

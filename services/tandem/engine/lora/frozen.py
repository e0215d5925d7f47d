"""The base model under autograd: its weights read back layer by layer, and one layer as a differentiable function.

The operators are those of `ops.reference` in float32, whatever operator set serves: torch's autograd goes through them.
A layer's weights are copies outside of inference mode, made when the layer's turn comes and dropped after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tandem.engine.models.decoder import Decoder
from tandem.engine.ops.contract import AttentionShape, GatedMlp, HeadNorms, Linear, TokenBatch
from tandem.engine.ops.reference import PlainLinear, ReferenceOperators
from tandem.engine.ops.reference_attention import ReferenceAttention

_PAGE_TOKENS = 16
Pair = tuple[torch.Tensor, torch.Tensor]  # A and B, with gradients


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """One layer's parameters in float32. `linears` by target name, each a linear of its own."""

    number: int
    input_norm: torch.Tensor
    middle_norm: torch.Tensor
    head_norms: HeadNorms | None
    linears: Mapping[str, PlainLinear]


class FrozenModel:
    """What a training sees of the served decoder. Use it on the thread that executes plans."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self._decoder = decoder
        self._weights = decoder.weights
        self._device = device
        self._operators = ReferenceOperators(torch.float32)
        self._final_norm = _copied(self._weights.final_norm, device)
        self._head: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def epsilon(self) -> float:
        return self._weights.spec.norm_epsilon

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, H] float32."""
        with torch.no_grad():
            return _copied(self._decoder.embed(token_ids), self._device)

    def layer(self, number: int) -> FrozenLayer:
        """Read a layer back."""
        parts = self._weights.parts[number]
        assert isinstance(parts.mlp, GatedMlp), "experts are not trained"
        linears: dict[str, PlainLinear] = {}
        groups: tuple[tuple[Linear, tuple[str, ...]], ...] = (
            (parts.qkv, ("q_proj", "k_proj", "v_proj")),
            (parts.output, ("o_proj",)),
            (parts.mlp.gate_up, ("gate_proj", "up_proj")),
            (parts.mlp.down, ("down_proj",)),
        )
        with torch.no_grad():
            for linear, names in groups:
                for name, weight, bias in zip(names, linear.plain_weights(), linear.plain_biases(), strict=True):
                    own = None if bias is None else _copied(bias, self._device)
                    linears[name] = PlainLinear((_copied(weight, self._device),), (own,))
            norms = parts.head_norms
            heads = norms and HeadNorms(
                _copied(norms.query, self._device), _copied(norms.key, self._device), norms.epsilon
            )
            return FrozenLayer(
                number,
                _copied(parts.input_norm, self._device),
                _copied(parts.middle_norm, self._device),
                heads,
                linears,
            )

    def run_layer(
        self, layer: FrozenLayer, hidden: torch.Tensor, pairs: Mapping[str, Pair], scale: float
    ) -> torch.Tensor:
        """One layer over a whole sequence [T, H] float32, differentiable in `hidden` and `pairs`."""

        def linear(name: str, inputs: torch.Tensor) -> torch.Tensor:
            outputs = layer.linears[name](inputs)
            if name in pairs:
                a, b = pairs[name]
                outputs = outputs + (inputs @ a.t()) @ b.t() * scale
            return outputs

        norm, epsilon = self._operators.rms_norm, self.epsilon
        normed = norm(hidden, layer.input_norm, epsilon)
        step = self._attention(layer.number, len(hidden))
        qkv = torch.cat([linear(name, normed) for name in ("q_proj", "k_proj", "v_proj")], dim=-1)
        attended = step.attend(0, step.rope_and_store(0, qkv, layer.head_norms))
        hidden = hidden + linear("o_proj", attended)
        normed = norm(hidden, layer.middle_norm, epsilon)
        middle = self._operators.gate(linear("gate_proj", normed), linear("up_proj", normed))
        return hidden + linear("down_proj", middle)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, H], differentiable."""
        return self._operators.rms_norm(hidden, self._final_norm, self.epsilon)

    @property
    def head(self) -> torch.Tensor:
        """The output head [vocabulary, H] in the type it is served in; read back once, and kept."""
        if self._head is None:
            with torch.no_grad():
                (weight,) = self._weights.head.plain_weights()
                self._head = torch.empty(weight.shape, dtype=weight.dtype, device=self._device).copy_(weight)
        return self._head

    def _attention(self, layer: int, num_tokens: int) -> ReferenceAttention:
        """Attention of one sequence over a pool of its own: the layer's keys and values are part of the graph."""
        shape = self._weights.attention
        one_layer = AttentionShape(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            windows=(shape.windows[layer],),
            frequencies=_copied(shape.frequencies, self._device),
            attention_factor=shape.attention_factor,
        )
        num_pages = -(-num_tokens // _PAGE_TOKENS)
        counts = np.arange(num_tokens)
        batch = TokenBatch(
            page_tokens=_PAGE_TOKENS,
            offsets=np.array([0, num_tokens]),
            starts=np.array([0]),
            positions=counts,
            slots=counts,
            page_table=np.arange(num_pages)[None],
        )
        pool = torch.zeros((num_pages, 1, 2, shape.num_kv_heads, _PAGE_TOKENS, shape.head_dim), device=self._device)
        return ReferenceAttention(batch, pool, one_layer, torch.float32)


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A float32 copy that autograd may save: what was made in inference mode may not be."""
    return torch.empty(tensor.shape, dtype=torch.float32, device=device).copy_(tensor)

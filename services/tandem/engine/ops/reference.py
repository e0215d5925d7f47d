"""The operators in plain torch: readable, exact enough to be the measure of others, and quick enough to serve with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as functional

from tandem.engine.ops.composed import ComposedExperts, ComposedLayers
from tandem.engine.ops.contract import (
    AttentionShape,
    AttentionStep,
    Embedding,
    Experts,
    ExpertWeights,
    GatedLinear,
    LayerParts,
    LayerStack,
    Linear,
    Routing,
    TokenBatch,
)
from tandem.engine.ops.reference_attention import ReferenceAttention

_BLOCK_ELEMENTS = 1 << 20  # of a weight, widened at a time: 4 MB of float32; measured best for 1 to 1024 tokens


class ReferenceOperators:
    """Operators of one device. `activation_dtype` float32 over narrower weights widens them blockwise in each linear.

    That is the way on a CPU without bf16 instructions, where a bf16 matrix product is many times slower than widening
    the weights to float32 and multiplying those; and it needs no second copy of the weights.
    """

    name = "reference"
    packs_weights = False
    workspace_bytes = 0  # torch's own allocator keeps what it likes
    numerics = ""  # torch's own products depend on the size of the batch: nothing is claimed
    profiler = None

    def __init__(self, activation_dtype: torch.dtype) -> None:
        self._activation_dtype = activation_dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        return self._activation_dtype

    def linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Linear:
        narrow = any(weight.dtype != self._activation_dtype for weight in weights)
        cast = tuple(None if bias is None else bias.to(self._activation_dtype) for bias in biases)
        return WideningLinear(tuple(weights), cast) if narrow else PlainLinear(tuple(weights), cast)

    def gated_linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> GatedLinear:
        return TorchGatedLinear(self.linear(weights, biases))

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate) * up

    def experts(self, router: torch.Tensor, experts: Iterable[ExpertWeights], routing: Routing) -> Experts:
        return ComposedExperts(self, lambda inputs: functional.linear(inputs.float(), router), experts, routing)

    def embedding(self, table: torch.Tensor) -> Embedding:
        return lambda token_ids: functional.embedding(token_ids, table).float()

    def tied_embedding(self, table: torch.Tensor) -> tuple[Embedding, Linear]:
        return self.embedding(table), self.linear((table,), (None,))

    def rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return functional.rms_norm(residual, weight.shape, weight, epsilon).to(self._activation_dtype)

    def layers(self, parts: Sequence[LayerParts], epsilon: float) -> LayerStack:
        return ComposedLayers(self, parts, epsilon)

    def logits(self, head: Linear, hidden: torch.Tensor) -> torch.Tensor:
        return head(hidden).float()

    def begin(self, batch: TokenBatch, pool: torch.Tensor, shape: AttentionShape) -> AttentionStep:
        return ReferenceAttention(batch, pool, shape, self._activation_dtype)


class PlainLinear:
    """Weights and inputs of one type."""

    def __init__(self, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor | None, ...]) -> None:
        self._parts = tuple(zip(weights, biases, strict=True))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = [functional.linear(inputs, weight, bias) for weight, bias in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        residual += self(inputs)

    def plain_weights(self) -> list[torch.Tensor]:
        return [weight for weight, _ in self._parts]

    def plain_biases(self) -> list[torch.Tensor | None]:
        return [bias for _, bias in self._parts]


class WideningLinear:
    """Float32 inputs and outputs over narrower weights, which are widened a block of output rows at a time."""

    def __init__(self, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor | None, ...]) -> None:
        self._parts = tuple(zip(weights, biases, strict=True))
        self._num_outputs = sum(weight.shape[0] for weight in weights)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        result = inputs.new_empty(inputs.shape[0], self._num_outputs)
        first = 0
        for weight, bias in self._parts:
            outputs = result[:, first : first + weight.shape[0]]
            self._multiply(inputs, weight, outputs)
            if bias is not None:
                outputs += bias
            first += weight.shape[0]
        return result

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        residual += self(inputs)

    def plain_weights(self) -> list[torch.Tensor]:
        return [weight for weight, _ in self._parts]

    def plain_biases(self) -> list[torch.Tensor | None]:
        return [bias for _, bias in self._parts]

    @staticmethod
    def _multiply(inputs: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor) -> None:
        rows = max(16, _BLOCK_ELEMENTS // weight.shape[1])
        widened = inputs.new_empty(min(rows, weight.shape[0]), weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows]
            wide = widened[: block.shape[0]]
            wide.copy_(block)
            torch.mm(inputs, wide.t(), out=outputs[:, start : start + rows])


class TorchGatedLinear:
    """silu(first half) * second half of a linear's outputs."""

    def __init__(self, gate_up: Linear) -> None:
        self._gate_up = gate_up

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        gate, up = self.halves(inputs)
        return functional.silu(gate) * up

    def halves(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = self._gate_up(inputs).chunk(2, dim=-1)
        return gate, up

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        residual += self(inputs)

    def plain_weights(self) -> list[torch.Tensor]:
        return self._gate_up.plain_weights()

    def plain_biases(self) -> list[torch.Tensor | None]:
        return self._gate_up.plain_biases()

"""Decoder layers and experts as operators of a set one by one: what every fused way of running them has to equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from tandem.engine.ops.contract import (
    AttentionStep,
    Experts,
    ExpertWeights,
    GatedMlp,
    LayerParts,
    Linear,
    Operators,
    Reduction,
    Routing,
)


class ComposedLayers:
    """See `contract.LayerStack`. With a `reduction`, the layers' linears are one tensor rank's parts."""

    def __init__(
        self, operators: Operators, parts: Sequence[LayerParts], epsilon: float, reduction: Reduction | None = None
    ) -> None:
        self._operators = operators
        self._parts = tuple(parts)
        self._epsilon = epsilon
        self._reduction = reduction

    def reserve(self, step: AttentionStep, hidden: int) -> None:
        """Experts' results are the most that a layer needs; other operators take what they need when they run."""
        for layer in self._parts:
            if not isinstance(layer.mlp, GatedMlp):
                layer.mlp.reserve(step.num_tokens)

    def __call__(self, step: AttentionStep, residual: torch.Tensor) -> None:
        rms_norm, epsilon = self._operators.rms_norm, self._epsilon
        for number, layer in enumerate(self._parts):
            qkv = layer.qkv(rms_norm(residual, layer.input_norm, epsilon))
            queries = step.rope_and_store(number, qkv, layer.head_norms)
            self._add(residual, layer.output, step.attend(number, queries))
            self._add(residual, layer.mlp, rms_norm(residual, layer.middle_norm, epsilon))

    def _add(self, residual: torch.Tensor, operator: Linear | GatedMlp | Experts, inputs: torch.Tensor) -> None:
        if self._reduction is None:
            operator.add_to(residual, inputs)
            return
        part = torch.zeros_like(residual)
        operator.add_to(part, inputs)
        self._reduction.add_to(residual, part)


class ComposedExperts:
    """See `contract.Experts`. `router` gives logits [N, experts] float32 for activations [N, H]."""

    def __init__(
        self,
        operators: Operators,
        router: Callable[[torch.Tensor], torch.Tensor],
        experts: Iterable[ExpertWeights],
        routing: Routing,
    ) -> None:
        self._router = router
        self._routing = routing
        self._experts = [
            GatedMlp(operators.gated_linear((one.gate, one.up), (None, None)), operators.linear((one.down,), (None,)))
            for one in experts
        ]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._sum(inputs).to(inputs.dtype)

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        residual += self._sum(inputs)

    def reserve(self, num_tokens: int) -> None:
        """Nothing is held between calls."""

    def _sum(self, inputs: torch.Tensor) -> torch.Tensor:
        chosen, weights = route(self._router(inputs), self._routing)
        total = torch.zeros_like(inputs, dtype=torch.float32)
        for number, expert in zip(self._routing.here, self._experts, strict=True):
            tokens, ranks = torch.where(chosen == number)
            if len(tokens):
                total[tokens] += expert(inputs[tokens]).float() * weights[tokens, ranks, None]
        return total


def route(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, experts] float32 -> each token's experts [N, k], the most probable first, and their weights [N, k]."""
    probabilities, numbers = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weights = probabilities[:, : routing.experts_per_token]
    if routing.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return numbers[:, : routing.experts_per_token], weights

"""Decoder layers as the operators of a set, one by one: what every fused way of running them has to equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem.engine.ops.contract import AttentionStep, LayerParts, Operators


class ComposedLayers:
    """See `contract.LayerStack`."""

    def __init__(self, operators: Operators, parts: Sequence[LayerParts], epsilon: float) -> None:
        self._operators = operators
        self._parts = tuple(parts)
        self._epsilon = epsilon

    def reserve(self, step: AttentionStep, hidden: int) -> None:
        """Operators one by one take what they need when they run."""

    def __call__(self, step: AttentionStep, residual: torch.Tensor) -> None:
        rms_norm, epsilon = self._operators.rms_norm, self._epsilon
        for number, layer in enumerate(self._parts):
            qkv = layer.qkv(rms_norm(residual, layer.input_norm, epsilon))
            queries = step.rope_and_store(number, qkv, layer.head_norms)
            layer.output.add_to(residual, step.attend(number, queries))
            layer.down.add_to(residual, layer.gate_up(rms_norm(residual, layer.middle_norm, epsilon)))

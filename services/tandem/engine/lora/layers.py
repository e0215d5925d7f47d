"""Decoder layers where adapters change some of the tokens: the operators one by one, and each adapter's part added.

A token without an adapter goes through the same operators as in a plan without adapters, so where a row's bits do not
depend on other rows, they are the same whatever adapters others use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem.engine.lora.adapters import AdapterRows, Delta, others
from tandem.engine.ops.contract import AttentionStep, GatedLinear, GatedMlp, LayerParts, Operators


class AdaptedLayers:
    """What `contract.LayerStack` is to plans without adapters. Shares the prepared linears of the layers."""

    def __init__(self, operators: Operators, parts: Sequence[LayerParts], epsilon: float) -> None:
        self._operators = operators
        self._parts = tuple(parts)
        self._epsilon = epsilon

    def __call__(self, step: AttentionStep, residual: torch.Tensor, groups: Sequence[AdapterRows]) -> None:
        """Take a plan through the layers; `groups` share no token, and there is at least one."""
        rms_norm, epsilon = self._operators.rms_norm, self._epsilon
        plain = others(groups, residual.shape[0])
        for number, layer in enumerate(self._parts):
            normed = rms_norm(residual, layer.input_norm, epsilon)
            qkv = layer.qkv(normed)
            for group in groups:
                for columns, delta in group.layers[number].qkv:
                    _add(qkv[:, columns], normed, group, delta)
            attended = step.attend(number, step.rope_and_store(number, qkv, layer.head_norms))
            layer.output.add_to(residual, attended)
            for group in groups:
                _add(residual, attended, group, group.layers[number].output)
            normed = rms_norm(residual, layer.middle_norm, epsilon)
            if not isinstance(layer.mlp, GatedMlp):
                layer.mlp.add_to(residual, normed)  # experts have no adapters
                continue
            middle = self._gated(layer.mlp.gate_up, number, normed, groups, plain)
            layer.mlp.down.add_to(residual, middle)
            for group in groups:
                _add(residual, middle, group, group.layers[number].down)

    def _gated(
        self,
        gate_up: GatedLinear,
        number: int,
        normed: torch.Tensor,
        groups: Sequence[AdapterRows],
        plain: torch.Tensor,
    ) -> torch.Tensor:
        """silu(gate) * up of every token. Adapters add to both before, so their tokens are computed apart."""
        if not any(group.layers[number].is_gated for group in groups):
            return gate_up(normed)
        middle: torch.Tensor | None = None
        for group in groups:
            inputs = normed[group.tokens]
            deltas = group.layers[number]
            gate, up = gate_up.halves(inputs)
            if deltas.gate is not None:
                gate = gate + deltas.gate(inputs)
            if deltas.up is not None:
                up = up + deltas.up(inputs)
            gated = self._operators.gate(gate, up)
            if middle is None:
                middle = gated.new_empty(normed.shape[0], gated.shape[1])
            middle[group.tokens] = gated
        assert middle is not None
        if len(plain):
            middle[plain] = gate_up(normed[plain])
        return middle


def _add(outputs: torch.Tensor, inputs: torch.Tensor, group: AdapterRows, delta: Delta | None) -> None:
    """Add an adapter's part to the rows of its tokens, in place. One addition for each value: exact in any order."""
    if delta is not None:
        added = delta(inputs[group.tokens])
        outputs.index_add_(0, group.tokens, added.to(outputs.dtype))

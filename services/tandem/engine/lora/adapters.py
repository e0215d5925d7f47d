"""Adapters that are ready to be computed with, by digest, and which tokens of a plan each of them changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem.core.messages.plans import Plan
from tandem.engine.lora.weights import LoraMatrices, LoraWeights
from tandem.engine.models.spec import DecoderSpec
from tandem.engine.ops.contract import Linear, Operators


class Delta:
    """scale * (x A^T) B^T, as two linears of the operator set: a row's bits do not depend on the other rows."""

    def __init__(self, operators: Operators, pair: LoraMatrices, scale: float, device: torch.device) -> None:
        self._a: Linear = operators.linear((pair.a.to(device),), (None,))
        self._b: Linear = operators.linear(((pair.b * scale).to(device),), (None,))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, inputs] activations -> [n, outputs]."""
        return self._b(self._a(inputs))


@dataclass(frozen=True, slots=True)
class LayerDeltas:
    """One adapter on one layer; `qkv` has its parts with the columns of the joint output that they are added to."""

    qkv: tuple[tuple[slice, Delta], ...]
    output: Delta | None
    gate: Delta | None
    up: Delta | None
    down: Delta | None

    @property
    def is_gated(self) -> bool:
        """Whether it changes what is in front of the activation."""
        return self.gate is not None or self.up is not None


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The tokens of a plan that one adapter changes: `tokens` [n] int64, numbers in the batch, on the device."""

    layers: tuple[LayerDeltas, ...]
    tokens: torch.Tensor


class AdapterStore:
    """All adapters of a worker. Used by the thread that executes plans, in inference mode."""

    def __init__(self, operators: Operators, spec: DecoderSpec, device: torch.device) -> None:
        self._operators = operators
        self._spec = spec
        self._device = device
        self._layers: dict[str, tuple[LayerDeltas, ...]] = {}

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(self._layers)

    def add(self, weights: LoraWeights) -> str:
        """Prepare an adapter; returns its digest. One that is there already stays as it is."""
        digest = weights.digest
        if digest not in self._layers:
            self._layers[digest] = tuple(self._layer(weights, layer) for layer in range(self._spec.num_layers))
        return digest

    def keep(self, digests: frozenset[str]) -> None:
        """Let go of all but these."""
        for digest in self._layers.keys() - digests:
            del self._layers[digest]

    def rows_of(self, plan: Plan, offsets: np.ndarray) -> list[AdapterRows]:
        """Group a plan's tokens by adapter; those of no adapter are in no group. `offsets` as in TokenBatch."""
        tokens: dict[str, list[np.ndarray]] = {}
        for number, row in enumerate(plan.rows):
            if row.adapter:
                tokens.setdefault(row.adapter, []).append(np.arange(offsets[number], offsets[number + 1]))
        return [
            AdapterRows(self._layers[digest], torch.from_numpy(np.concatenate(parts)).to(self._device))
            for digest, parts in sorted(tokens.items())
        ]

    def _layer(self, weights: LoraWeights, layer: int) -> LayerDeltas:
        def delta(target: str) -> Delta | None:
            pair = weights.matrices.get((layer, target))
            return None if pair is None else Delta(self._operators, pair, weights.shape.scale, self._device)

        spec, first = self._spec, 0
        qkv: list[tuple[slice, Delta]] = []
        for target, heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads), ("v_proj", spec.num_kv_heads)):
            columns = slice(first, first + heads * spec.head_dim)
            first = columns.stop
            if (part := delta(target)) is not None:
                qkv.append((columns, part))
        return LayerDeltas(tuple(qkv), delta("o_proj"), delta("gate_proj"), delta("up_proj"), delta("down_proj"))


def others(groups: Sequence[AdapterRows], num_tokens: int) -> torch.Tensor:
    """Numbers of the tokens that are in none of the groups, ascending."""
    free = torch.ones(num_tokens, dtype=torch.bool, device=groups[0].tokens.device)
    for group in groups:
        free[group.tokens] = False
    return free.nonzero()[:, 0]

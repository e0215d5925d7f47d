"""A LoRA adapter's weights: low-rank products that are added to the outputs of a model's linears.

For a target linear with inputs x the adapter adds scale * (x A^T) B^T. An adapter is known by the digest of what it
computes, never by its name: two folders with the same weights are one adapter, and a changed folder is another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tandem.engine.models.spec import DecoderSpec
from tandem.engine.models.tensors import expected_tensors, layer_prefix

# By the name of the linear: where it is in a decoder layer. PEFT's `target_modules` uses the same names.
TARGETS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """`a` [rank, inputs] and `b` [outputs, rank], float32."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraShape:
    """What PEFT's configuration says of an adapter: `scale` follows from it."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        return float(self.alpha / self.rank**0.5 if self.rslora else self.alpha / self.rank)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """`matrices` by (layer, target name of TARGETS); a linear that is not in it is left as it is."""

    shape: LoraShape
    matrices: Mapping[tuple[int, str], LoraMatrices]

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of what it computes."""
        digest = hashlib.sha256(f"lora/1/{self.shape.scale!r}".encode())
        for (layer, target), pair in sorted(self.matrices.items()):
            digest.update(f";{layer}.{target}:{tuple(pair.a.shape)}:{tuple(pair.b.shape)};".encode())
            for matrix in (pair.a, pair.b):
                digest.update(matrix.detach().float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def target_shapes(spec: DecoderSpec) -> dict[tuple[int, str], tuple[int, int]]:
    """(outputs, inputs) of every linear of the model that an adapter can change, by (layer, target name)."""
    expected = expected_tensors(spec)
    shapes: dict[tuple[int, str], tuple[int, int]] = {}
    for layer in range(spec.num_layers):
        for target, place in TARGETS.items():
            shape = expected.get(f"{layer_prefix(layer)}{place}.weight")
            if shape is not None:
                shapes[layer, target] = (shape[0], shape[1])
    return shapes

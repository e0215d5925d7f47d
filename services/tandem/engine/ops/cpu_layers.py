"""Decoder layers by the C++ operators: all of a plan's layers are one call and one parallel region."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from tandem.engine.native.library import LayerFields, LinearFields
from tandem.engine.ops.contract import AttentionShape, AttentionStep, GatedMlp, LayerParts, Linear
from tandem.engine.ops.cpu_attention import CpuAttention
from tandem.engine.ops.cpu_experts import CpuExperts


class CpuLayers:
    """See `contract.LayerStack`. Holds the layers' weights."""

    def __init__(self, parts: Sequence[LayerParts], epsilon: float) -> None:
        self._parts = tuple(parts)  # the fields below point into their memory
        self._fields = (LayerFields * len(self._parts))()
        for fields, part in zip(self._fields, self._parts, strict=True):
            _fill(fields, part, epsilon)
        self._shape: AttentionShape | None = None  # whose windows the fields have

    def __call__(self, step: AttentionStep, residual: torch.Tensor) -> None:
        assert residual.is_contiguous() and residual.dtype == torch.float32
        self._own(step).run_layers(self._fields, residual)

    def reserve(self, step: AttentionStep, hidden: int) -> None:
        self._own(step).reserve_layers(self._fields, hidden)

    def _own(self, step: AttentionStep) -> CpuAttention:
        """Return the step as what it is, its windows known to the layers."""
        assert isinstance(step, CpuAttention), "a plan of another operator set"
        if step.shape is not self._shape:
            for fields, window in zip(self._fields, step.shape.windows, strict=True):
                fields.window = window or 0
            self._shape = step.shape
        return step


def _fill(fields: LayerFields, part: LayerParts, epsilon: float) -> None:
    fields.input_norm = _floats(part.input_norm)
    fields.middle_norm = _floats(part.middle_norm)
    fields.epsilon = epsilon
    if part.head_norms is not None:
        fields.query_norm = _floats(part.head_norms.query)
        fields.key_norm = _floats(part.head_norms.key)
        fields.head_epsilon = part.head_norms.epsilon
    fields.qkv, fields.output = _packed(part.qkv), _packed(part.output)
    if isinstance(part.mlp, GatedMlp):
        fields.gate_up, fields.down = _packed(part.mlp.gate_up), _packed(part.mlp.down)
    else:
        assert isinstance(part.mlp, CpuExperts), "experts of another operator set"
        fields.experts = ctypes.pointer(part.mlp.fields)


def _packed(linear: Linear) -> LinearFields:
    fields = getattr(linear, "fields", None)
    assert isinstance(fields, LinearFields), "a linear of another operator set"
    return fields


def _floats(weight: torch.Tensor) -> int:
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    return weight.data_ptr()

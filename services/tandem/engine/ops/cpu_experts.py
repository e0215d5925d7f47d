"""A layer's experts by the C++ operators: routed, grouped by expert, multiplied and added up in one parallel region."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Protocol

import torch

from tandem.engine.native.library import BFLOAT16, FLOAT32, ExpertsFields, LinearFields
from tandem.engine.native.memory import NativePages, RecycledTensors
from tandem.engine.ops.contract import ExpertWeights, Routing

_ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


class Runtime(Protocol):
    """What is needed of `cpu.CpuRuntime`."""

    library: ctypes.CDLL
    handle: int
    tensors: RecycledTensors


class PackedLinear(Protocol):
    """What is needed of `cpu.CpuLinear`."""

    fields: LinearFields


class CpuExperts:
    """See `contract.Experts`. All weights are packed into two runs of memory; the plain ones are not kept."""

    def __init__(
        self, runtime: Runtime, router: PackedLinear, experts: Iterable[ExpertWeights], routing: Routing
    ) -> None:
        self._runtime = runtime
        self._router = router
        self.fields = ExpertsFields()
        self.fields.router = router.fields
        self.fields.first, self.fields.count = routing.here.start, len(routing.here)
        self.fields.per_row = routing.experts_per_token
        self.fields.normalized = int(routing.normalized)
        count = 0
        for number, one in enumerate(experts):
            if number == 0:
                self._dtype = one.gate.dtype
                self._gate_up = self._reserve(self.fields.gate_up, one.gate, gated=True)
                self._down = self._reserve(self.fields.down, one.down, gated=False)
            self._move(number, self._runtime.library.tandem_pack, one)
            count += 1
        assert count == len(routing.here) > 0, "not the experts that were announced"

    @property
    def num_bytes(self) -> int:
        return self._gate_up.num_bytes + self._down.num_bytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self._runtime.tensors.empty(inputs.shape[0], self.fields.down.outputs)
        self._compute(inputs, outputs, add=False)
        return outputs

    def add_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> None:
        """See the contract."""
        self._compute(inputs, residual, add=True)

    def reserve(self, num_tokens: int) -> None:
        """See the contract."""
        _check(self._runtime.library.tandem_experts(self._runtime.handle, self.fields, num_tokens, None, 0, None, 0, 0))

    def plain_weights(self, number: int) -> ExpertWeights:
        """An expert that is here, by its place among them, unpacked into tensors of the caller's."""
        middle, hidden = self.fields.gate_up.outputs, self.fields.down.outputs
        gate, up = (torch.empty(middle, hidden, dtype=self._dtype) for _ in range(2))
        plain = ExpertWeights(gate, up, torch.empty(hidden, middle, dtype=self._dtype))
        self._move(number, self._runtime.library.tandem_unpack, plain)
        return plain

    def _compute(self, inputs: torch.Tensor, outputs: torch.Tensor, *, add: bool) -> None:
        if inputs.stride(1) != 1:
            inputs = inputs.contiguous()
        assert inputs.dtype == torch.float32 and inputs.shape[1] == self.fields.gate_up.depth, "inputs do not fit"
        status = self._runtime.library.tandem_experts(
            self._runtime.handle,
            self.fields,
            inputs.shape[0],
            inputs.data_ptr(),
            inputs.stride(0),
            outputs.data_ptr(),
            outputs.stride(0),
            int(add),
        )
        _check(status)

    def _reserve(self, fields: LinearFields, weight: torch.Tensor, *, gated: bool) -> NativePages:
        """Take the memory of all experts' weights like this one, and describe the first."""
        fields.outputs, fields.depth = weight.shape
        fields.element, fields.gated = _ELEMENTS[weight.dtype], int(gated)
        library = self._runtime.library
        pages = NativePages(library, self.fields.count * library.tandem_packed_bytes(fields))
        fields.packed = pages.address
        return pages

    def _move(self, number: int, move: object, one: ExpertWeights) -> None:
        """Pack an expert's weights to its place, or unpack them from there."""
        assert callable(move) and number < self.fields.count
        for fields, weights in ((self.fields.gate_up, (one.gate, one.up)), (self.fields.down, (one.down,))):
            plain = [weight.contiguous() for weight in weights]
            rows = fields.outputs
            assert all(weight.shape == (rows, fields.depth) and weight.dtype == self._dtype for weight in plain)
            own = LinearFields(fields.packed, None, rows, fields.depth, fields.element, fields.gated)
            own.packed += number * self._runtime.library.tandem_packed_bytes(fields)
            pointers = (ctypes.c_void_p * len(plain))(*(weight.data_ptr() for weight in plain))
            counts = (ctypes.c_int64 * len(plain))(*[rows] * len(plain))
            _check(move(self._runtime.handle, own, pointers, counts, len(plain)))


def _check(status: int) -> None:
    if status:
        raise MemoryError("experts found no memory for their workspace")

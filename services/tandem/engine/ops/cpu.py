"""The operators in C++ for x86-64: each CPU near its limit, and the same bits whatever else is in the batch.

docs/numerics.md says what is guaranteed and why. Activations are float32; weights are bf16 or float32, packed once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch

from tandem.engine.native.library import BFLOAT16, FLOAT32, LinearFields, NativeUnavailable, load_library
from tandem.engine.native.memory import NativePages, RecycledTensors
from tandem.engine.ops.contract import (
    AttentionShape,
    AttentionStep,
    Embedding,
    ExpertWeights,
    LayerParts,
    LayerStack,
    Linear,
    Routing,
    TokenBatch,
)
from tandem.engine.ops.cpu_attention import CpuAttention
from tandem.engine.ops.cpu_experts import CpuExperts
from tandem.engine.ops.cpu_layers import CpuLayers
from tandem.engine.ops.cpu_profile import CpuProfiler

KERNELS = ("amx", "avx512bf16", "avx512", "avx2")  # best first
# A thread without work waits so long before it sleeps: longer than Python takes between a step's layers and its head.
SPIN_NANOSECONDS = 500_000

_PANEL_COLUMNS = 16  # kPanelColumns of native/kernels.hpp
_ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
# Kernels of one arithmetic give the same bits: how wide a register is changes nothing. The number is the arithmetic's
# version, raised with every change of an operation's order or rounding.
_ARITHMETIC = {"avx2": "fma-1", "avx512": "fma-1", "avx512bf16": "bf16dot-2", "amx": "amx-1"}
_MULTIPLY_PAIRS = ("amx", "avx512bf16")


def supported_kernels(library: ctypes.CDLL) -> tuple[str, ...]:
    """Names of the kernels that this CPU runs, best first."""
    return tuple(name for name in KERNELS if library.tandem_supports(name.encode()))


class CpuRuntime:
    """Kernels of one instruction set, their threads and workspaces. Used by one thread at a time."""

    def __init__(self, library: ctypes.CDLL, kernels: str, num_threads: int) -> None:
        self.library = library
        self.kernels = kernels
        self.handle: int = library.tandem_create(kernels.encode(), num_threads, SPIN_NANOSECONDS) or 0
        if not self.handle:
            raise NativeUnavailable(f"{kernels} kernels with {num_threads} threads cannot run here")
        self.tensors = RecycledTensors(library)

    @property
    def workspace_bytes(self) -> int:
        return int(self.library.tandem_workspace_bytes(self.handle)) + self.tensors.num_bytes

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self.library.tandem_destroy(self.handle)


class CpuOperators:
    """See `contract.Operators`; raises NativeUnavailable if the library or the asked-for kernels are not there.

    `kernels` is one of KERNELS, or "auto" for the best that this CPU runs. `num_threads` counts the calling thread.
    """

    activation_dtype = torch.float32
    packs_weights = True

    def __init__(self, kernels: str = "auto", num_threads: int = 1, library: ctypes.CDLL | None = None) -> None:
        library = library or load_library()
        supported = supported_kernels(library)
        if kernels == "auto" and not supported:
            raise NativeUnavailable("this CPU has no AVX2 and FMA")
        self._runtime = CpuRuntime(library, supported[0] if kernels == "auto" else kernels, num_threads)

    @property
    def name(self) -> str:
        return f"cpu-{self._runtime.kernels}"

    @property
    def numerics(self) -> str:
        return f"cpu-{_ARITHMETIC.get(self._runtime.kernels, self._runtime.kernels)}"

    @property
    def multiplies_pairs(self) -> bool:
        """Whether linears over bf16 weights multiply pairs of bf16: `multiply_rate` then knows `dot_products`."""
        return self._runtime.kernels in _MULTIPLY_PAIRS

    @property
    def workspace_bytes(self) -> int:
        return self._runtime.workspace_bytes

    @property
    def profiler(self) -> CpuProfiler:
        return CpuProfiler(self._runtime)

    def linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> CpuLinear:
        return CpuLinear(self._runtime, weights, biases, gated=False)

    def gated_linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> CpuLinear:
        return CpuLinear(self._runtime, weights, biases, gated=True)

    def experts(self, router: torch.Tensor, experts: Iterable[ExpertWeights], routing: Routing) -> CpuExperts:
        return CpuExperts(self._runtime, self.linear((router,), (None,)), experts, routing)

    def embedding(self, table: torch.Tensor) -> Embedding:
        return CpuEmbedding(self._runtime, table, None)

    def tied_embedding(self, table: torch.Tensor) -> tuple[Embedding, Linear]:
        """See the contract: vectors are read out of the packed weight, the plain table is not kept."""
        packed = self.linear((table,), (None,))
        return CpuEmbedding(self._runtime, table, packed), packed

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        assert gate.shape == up.shape and gate.stride(1) == up.stride(1) == 1, "halves do not match"
        outputs = self._runtime.tensors.empty(*gate.shape)
        check(
            self._runtime.library.tandem_gate(
                self._runtime.handle,
                *gate.shape,
                gate.data_ptr(),
                gate.stride(0),
                up.data_ptr(),
                up.stride(0),
                outputs.data_ptr(),
            )
        )
        return outputs

    def rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        rows, width = residual.shape
        outputs = self._runtime.tensors.empty(rows, width)
        check(
            self._runtime.library.tandem_rms_norm(
                self._runtime.handle,
                rows,
                width,
                residual.data_ptr(),
                residual.stride(0),
                weight.data_ptr(),
                epsilon,
                outputs.data_ptr(),
            )
        )
        return outputs

    def layers(self, parts: Sequence[LayerParts], epsilon: float) -> LayerStack:
        return CpuLayers(parts, epsilon)

    def logits(self, head: Linear, hidden: torch.Tensor) -> torch.Tensor:
        assert isinstance(head, CpuLinear), "a linear of another operator set"
        return head(hidden, head=True)

    def begin(self, batch: TokenBatch, pool: torch.Tensor, shape: AttentionShape) -> AttentionStep:
        return CpuAttention(self._runtime, batch, pool, shape)

    def read_rate(self, num_bytes: int = 1 << 28) -> float:
        """Bytes a second that the threads read from memory together: a probe."""
        pages = NativePages(self._runtime.library, num_bytes)
        ctypes.memset(pages.address, 0, num_bytes)
        return float(self._runtime.library.tandem_read_rate(self._runtime.handle, pages.address, num_bytes))

    def multiply_rate(self, *, dot_products: bool, rounds: int = 200_000) -> float:
        """Floating-point operations a second of the threads in registers: a probe."""
        return float(self._runtime.library.tandem_multiply_rate(self._runtime.handle, rounds, int(dot_products)))


class CpuLinear:
    """A packed linear; see `contract.Linear`. The plain weights are not kept."""

    def __init__(
        self,
        runtime: CpuRuntime,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        *,
        gated: bool,
    ) -> None:
        dtype, depth = weights[0].dtype, weights[0].shape[1]
        assert all(weight.dtype == dtype and weight.shape[1] == depth for weight in weights), "weights do not match"
        assert dtype in _ELEMENTS, f"no kernels for {dtype} weights"
        self._runtime = runtime
        self._dtype = dtype
        self._rows = [weight.shape[0] for weight in weights]
        assert not gated or (len(weights) == 2 and self._rows[0] == self._rows[1]), "a gate has an up of its shape"
        self.num_outputs = self._rows[0] if gated else sum(self._rows)
        self.fields = LinearFields(None, None, self.num_outputs, depth, _ELEMENTS[dtype], int(gated))
        self._pages = NativePages(runtime.library, runtime.library.tandem_packed_bytes(self.fields))
        self.fields.packed = self._pages.address
        plain = [weight.contiguous() for weight in weights]
        check(runtime.library.tandem_pack(runtime.handle, self.fields, *self._parts(plain)))
        self._plain_biases = tuple(biases)
        self._bias = self._packed_bias(biases, gated)
        if self._bias is not None:
            self.fields.bias = self._bias.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self._pages.num_bytes

    def __call__(self, inputs: torch.Tensor, *, head: bool = False) -> torch.Tensor:
        """`head`: profiles show it as the output head."""
        outputs = self._runtime.tensors.empty(inputs.shape[0], self.num_outputs)
        self._compute(inputs, outputs, add=False, head=head)
        return outputs

    def add_to(self, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add the result to `outputs` [N, outputs] float32."""
        self._compute(inputs, outputs, add=True)

    def halves(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `contract.GatedLinear`: the panels lie alternately, which is a linear of all of their columns."""
        assert self.fields.gated, "only a gated linear has halves"
        columns = -(-self.num_outputs // _PANEL_COLUMNS) * _PANEL_COLUMNS
        plain = LinearFields(
            self.fields.packed, self.fields.bias, 2 * columns, self.fields.depth, self.fields.element, 0
        )
        outputs = self._runtime.tensors.empty(inputs.shape[0], 2 * columns)
        self._compute(inputs, outputs, add=False, fields=plain)
        panels = outputs.view(inputs.shape[0], -1, 2, _PANEL_COLUMNS)
        gate, up = (panels[:, :, half].reshape(inputs.shape[0], columns)[:, : self.num_outputs] for half in (0, 1))
        return gate, up

    def plain_weights(self) -> list[torch.Tensor]:
        """The weights as they were given, unpacked into tensors of the caller's."""
        weights = [torch.empty(rows, self.fields.depth, dtype=self._dtype) for rows in self._rows]
        check(self._runtime.library.tandem_unpack(self._runtime.handle, self.fields, *self._parts(weights)))
        return weights

    def plain_biases(self) -> list[torch.Tensor | None]:
        return list(self._plain_biases)

    def _compute(
        self,
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        *,
        add: bool,
        fields: LinearFields | None = None,
        head: bool = False,
    ) -> None:
        if inputs.stride(1) != 1:
            inputs = inputs.contiguous()
        assert inputs.dtype == torch.float32 and inputs.shape[1] == self.fields.depth, "inputs do not fit"
        check(
            self._runtime.library.tandem_linear(
                self._runtime.handle,
                fields or self.fields,
                inputs.shape[0],
                inputs.data_ptr(),
                inputs.stride(0),
                outputs.data_ptr(),
                outputs.stride(0),
                int(add),
                int(head),
            )
        )

    def _parts(self, tensors: Sequence[torch.Tensor]) -> tuple[object, object, int]:
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        rows = (ctypes.c_int64 * len(tensors))(*self._rows)
        return pointers, rows, len(tensors)

    def _packed_bias(self, biases: Sequence[torch.Tensor | None], gated: bool) -> torch.Tensor | None:
        """Biases in the order of the packed columns, zeros where there is none."""
        if all(bias is None for bias in biases):
            return None
        parts = [
            torch.zeros(rows) if bias is None else bias.float() for bias, rows in zip(biases, self._rows, strict=True)
        ]
        columns = torch.stack(parts) if gated else torch.cat(parts)[None]
        padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % 16))
        return padded.view(len(columns), -1, 16).transpose(0, 1).contiguous()


class CpuEmbedding:
    """A table of token vectors, plain or inside of a packed linear; see `contract.Embedding`."""

    def __init__(self, runtime: CpuRuntime, table: torch.Tensor, packed: CpuLinear | None) -> None:
        self._runtime = runtime
        self._vocabulary, self._width = table.shape
        self._element = _ELEMENTS[table.dtype]
        self._table = table.contiguous() if packed is None else None
        self._packed = packed

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        outputs = self._runtime.tensors.empty(token_ids.shape[0], self._width)
        ids = token_ids.contiguous()
        status = self._runtime.library.tandem_embedding(
            self._runtime.handle,
            None if self._table is None else self._table.data_ptr(),
            self._element,
            None if self._packed is None else ctypes.byref(self._packed.fields),
            self._vocabulary,
            self._width,
            len(ids),
            ids.data_ptr(),
            outputs.data_ptr(),
        )
        if status == 2:
            raise IndexError(f"a token id is not in [0, {self._vocabulary})")
        check(status)
        return outputs


def check(status: int) -> None:
    """Raise MemoryError for a call that failed: nothing else can."""
    if status:
        raise MemoryError("an operator found no memory for its workspace")

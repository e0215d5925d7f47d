"""One plan's attention by the C++ operators."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import torch

from tandem.engine.native.library import BFLOAT16, FLOAT32, LayerFields, PlanFields
from tandem.engine.native.memory import RecycledTensors
from tandem.engine.ops.contract import AttentionShape, HeadNorms, TokenBatch

_ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
HEAD_DIM_MAX = 1024


class Runtime(Protocol):
    """What is needed of `cpu.CpuRuntime`; held so that it outlives the plan."""

    library: ctypes.CDLL
    handle: int
    tensors: RecycledTensors


class CpuAttention:
    """See `contract.AttentionStep`. Holds the pool and the runtime."""

    def __init__(self, runtime: Runtime, batch: TokenBatch, pool: torch.Tensor, shape: AttentionShape) -> None:
        _, num_layers, _, kv_heads, page_tokens, head_dim = pool.shape
        assert pool.is_contiguous() and pool.dtype in _ELEMENTS, "the pool is not as the contract says"
        assert head_dim == shape.head_dim and kv_heads == shape.num_kv_heads and page_tokens == batch.page_tokens
        assert head_dim % 2 == 0 and head_dim <= HEAD_DIM_MAX and shape.num_heads % kv_heads == 0
        self._runtime = runtime
        self._pool = pool
        self.shape = shape
        self.num_tokens = batch.num_tokens
        arrays = [
            np.ascontiguousarray(values, dtype=np.int64)
            for values in (batch.offsets, batch.starts, batch.positions, batch.slots, batch.page_table)
        ]
        frequencies = shape.frequencies.to(torch.float32).contiguous()
        fields = PlanFields(
            len(batch.starts),
            *(array.ctypes.data for array in arrays),
            batch.page_table.shape[1],
            shape.num_heads,
            kv_heads,
            head_dim,
            pool.data_ptr(),
            _ELEMENTS[pool.dtype],
            shape.attention_factor,
            num_layers,
            page_tokens,
            frequencies.data_ptr(),
        )
        self._plan: int = runtime.library.tandem_begin(runtime.handle, fields) or 0
        if not self._plan:
            raise MemoryError("no memory for a plan's attention")

    def __del__(self) -> None:
        if getattr(self, "_plan", 0):
            self._runtime.library.tandem_end(self._plan)

    def rope_and_store(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        shape = self.shape
        queries = self._runtime.tensors.empty(self.num_tokens, shape.num_heads * shape.head_dim)
        status = self._runtime.library.tandem_rope_and_store(
            self._plan,
            layer,
            qkv.data_ptr(),
            qkv.stride(0),
            None if norms is None else norms.query.data_ptr(),
            None if norms is None else norms.key.data_ptr(),
            0.0 if norms is None else norms.epsilon,
            queries.data_ptr(),
        )
        _check(status)
        return queries.view(self.num_tokens, shape.num_heads, shape.head_dim)

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        queries = queries.contiguous()
        outputs = self._runtime.tensors.empty(self.num_tokens, queries.shape[1] * queries.shape[2])
        window = self.shape.windows[layer] or 0
        status = self._runtime.library.tandem_attend(self._plan, layer, window, queries.data_ptr(), outputs.data_ptr())
        _check(status)
        return outputs

    def run_layers(self, layers: ctypes.Array[LayerFields], residual: torch.Tensor) -> None:
        """Take the plan through all `layers`; adds to `residual` [N, H] float32."""
        _check(
            self._runtime.library.tandem_layers(self._plan, layers, len(layers), residual.shape[1], residual.data_ptr())
        )

    def reserve_layers(self, layers: ctypes.Array[LayerFields], hidden: int) -> None:
        """Take the workspace that `run_layers` of this plan needs."""
        _check(self._runtime.library.tandem_layers(self._plan, layers, len(layers), hidden, None))


def _check(status: int) -> None:
    if status:
        raise MemoryError("attention found no memory for its workspace")

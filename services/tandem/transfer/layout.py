"""How KV lies in memory. Engine and transfer share this page and nothing else.

A pool is page-major: [page][layer][k|v][kv_head][slot][head_dim], so one page of one rank is one contiguous run of
bytes, and a head range is contiguous per (layer, k|v).
"""

from __future__ import annotations

from dataclasses import dataclass

PROTOCOL_VERSION = 1  # of the hand-off; part of the fingerprint

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Shape of one rank's pool. `dtype` is a key of DTYPE_BYTES."""

    num_pages: int
    num_layers: int
    num_kv_heads: int
    page_tokens: int
    head_dim: int
    dtype: str

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """[layer, k|v, kv_head, slot, head_dim]"""
        return (self.num_layers, 2, self.num_kv_heads, self.page_tokens, self.head_dim)

    @property
    def page_bytes(self) -> int:
        elements = 1
        for size in self.page_shape:
            elements *= size
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def fingerprint(self, model_digest: str, num_layers: int, num_kv_heads: int) -> str:
        """What must be equal for two workers to pair: the whole model's KV, however its ranks share it.

        `num_pages` is not part of it.
        """
        _, _, _, page_tokens, head_dim = self.page_shape
        shape = f"{num_layers}x2x{num_kv_heads}x{page_tokens}x{head_dim}"
        return f"{model_digest}/{self.dtype}/page-major-{shape}/protocol-{PROTOCOL_VERSION}"

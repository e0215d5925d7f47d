"""How KV lies in memory. Engine and transfer share this page and nothing else.

A pool is page-major: [page][layer][k|v][kv_head][slot][head_dim], so one page of one rank is one contiguous run of
bytes, and a head range is contiguous per (layer, k|v).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.core.messages.transfer import Slab
from tandem.core.sharding import KvPart

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

    @property
    def head_bytes(self) -> int:
        """Keys or values of one head in one layer of a page."""
        return self.page_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    def of_part(self, part: KvPart) -> KvLayout:
        """Return the layout of a rank that owns `part` of the model."""
        return replace(self, num_layers=part.num_layers, num_kv_heads=part.num_heads)

    def slab(self, part: KvPart) -> Slab:
        """Return where `part`, in this rank's own numbers, lies in each page: one run if it has all of the heads."""
        lane = self.num_kv_heads * self.head_bytes  # of one layer's keys, or values
        offset = part.first_layer * 2 * lane + part.first_head * self.head_bytes
        if part.num_heads == self.num_kv_heads:
            size = part.num_layers * 2 * lane
            return Slab(offset, size, size, 1)
        return Slab(offset, part.num_heads * self.head_bytes, lane, 2 * part.num_layers)

    def fingerprint(self, model_digest: str, num_layers: int, num_kv_heads: int) -> str:
        """What must be equal for two workers to pair: the whole model's KV, however its ranks share it.

        `num_pages` is not part of it.
        """
        _, _, _, page_tokens, head_dim = self.page_shape
        shape = f"{num_layers}x2x{num_kv_heads}x{page_tokens}x{head_dim}"
        return f"{model_digest}/{self.dtype}/page-major-{shape}/protocol-{PROTOCOL_VERSION}"

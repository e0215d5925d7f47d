"""Paged attention in plain torch: rows of one token in padded groups, longer rows one by one.

A pool is seen as blocks, one per (page, layer, k|v, kv_head), each [slot, head_dim] and contiguous: gathering the
blocks of a row gives its keys as [kv_head, position, head_dim] with one copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional

from tandem.engine.ops.contract import AttentionShape, HeadNorms, TokenBatch

_QUERY_BLOCK = 256  # queries of an extend row at a time: bounds the mask, and skips keys that are yet to come
_GROUP_ELEMENTS = 1 << 24  # keys gathered at a time for rows of one token
_FINITE_MAX = 1e18  # a product of two still has an exponent in float32


@dataclass(frozen=True, slots=True)
class _SingleRows:
    """Rows of one token whose page counts are alike, for one window."""

    tokens: torch.Tensor  # [r] indices into the batch
    blocks: torch.Tensor  # [r, K, pages] block numbers of layer 0's keys
    mask: torch.Tensor  # [r, 1, 1, pages * page_tokens] 0 or -inf


@dataclass(frozen=True, slots=True)
class _ExtendRow:
    """One row of several tokens, for one window."""

    tokens: slice
    blocks: torch.Tensor  # [K, pages]
    pieces: tuple[tuple[slice, slice, torch.Tensor | None], ...]  # queries, keys, mask (None: causal from key 0)


@dataclass(frozen=True, slots=True)
class _Work:
    singles: tuple[_SingleRows, ...]
    extends: tuple[_ExtendRow, ...]


class ReferenceAttention:
    """One plan's attention; see `contract.AttentionStep`."""

    def __init__(
        self, batch: TokenBatch, pool: torch.Tensor, shape: AttentionShape, activation_dtype: torch.dtype
    ) -> None:
        self.num_tokens = batch.num_tokens
        self._shape = shape
        self._dtype = activation_dtype
        _, self._num_layers, _, kv_heads, page_tokens, head_dim = pool.shape
        self._page_blocks = self._num_layers * 2 * kv_heads
        self._blocks = pool.view(-1, page_tokens * head_dim)
        self._lines = pool.view(-1, head_dim)  # one per (page, layer, k|v, kv_head, slot)
        self._device = pool.device
        self._head_numbers = torch.arange(kv_heads, device=pool.device)
        self._key_lines = self._store_lines(batch)
        angles = self._tensor(batch.positions).float()[:, None] * shape.frequencies
        self._cosine = (angles.cos() * shape.attention_factor)[:, None, :]
        self._sine = (angles.sin() * shape.attention_factor)[:, None, :]
        self._work = {window: self._plan(batch, window) for window in set(shape.windows)}

    def rope_and_store(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        shape = self._shape
        heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
        queries = heads[:, : shape.num_heads].float()
        keys = heads[:, shape.num_heads : shape.num_heads + shape.num_kv_heads].float()
        values = heads[:, shape.num_heads + shape.num_kv_heads :].float()
        if norms is not None:
            queries = functional.rms_norm(queries, norms.query.shape, norms.query, norms.epsilon)
            keys = functional.rms_norm(keys, norms.key.shape, norms.key, norms.epsilon)
        self._store(layer, 0, self._rotate(keys))
        self._store(layer, 1, values)
        return self._rotate(queries).to(self._dtype)

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        work = self._work[self._shape.windows[layer]]
        result = torch.empty_like(queries)
        for group in work.singles:
            result[group.tokens] = self._attend_singles(layer, queries[group.tokens], group)
        for row in work.extends:
            self._attend_extend(layer, queries[row.tokens], row, result[row.tokens])
        return result.view(result.shape[0], -1)

    def _attend_singles(self, layer: int, queries: torch.Tensor, group: _SingleRows) -> torch.Tensor:
        """[r, Q, D] -> [r, Q, D]. The query heads of one KV head stand where the queries of a sequence would."""
        kv_heads, head_dim = self._shape.num_kv_heads, self._shape.head_dim
        grouped = queries.view(queries.shape[0], kv_heads, -1, head_dim)
        keys, values = self._gather(layer, group.blocks)
        attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
        return attended.reshape(queries.shape)

    def _attend_extend(self, layer: int, queries: torch.Tensor, row: _ExtendRow, result: torch.Tensor) -> None:
        """Queries [n, Q, D] of one row, written to `result` of the same shape."""
        kv_heads, head_dim = self._shape.num_kv_heads, self._shape.head_dim
        group = self._shape.num_heads // kv_heads
        grouped = queries.view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [K, group, n, D]
        keys, values = self._gather(layer, row.blocks)  # [K, positions, D]
        keys, values = (part[:, None].expand(-1, group, -1, -1) for part in (keys, values))
        for query_range, key_range, mask in row.pieces:
            attended = functional.scaled_dot_product_attention(
                grouped[:, :, query_range],
                keys[:, :, key_range],
                values[:, :, key_range],
                attn_mask=mask,
                is_causal=mask is None,
            )
            result[query_range] = attended.permute(2, 0, 1, 3).reshape(-1, kv_heads * group, head_dim)

    def _gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., K, pages * page_tokens, D] of blocks [..., K, pages]."""
        first = layer * 2 * self._shape.num_kv_heads
        sides = []
        for side in (0, 1):
            numbers = blocks + (first + side * self._shape.num_kv_heads)
            gathered = functional.embedding(numbers, self._blocks)
            sides.append(gathered.view(*blocks.shape[:-1], -1, self._shape.head_dim).to(self._dtype))
        return sides[0], sides[1]

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, dim=-1)
        return torch.cat(
            (first * self._cosine - second * self._sine, second * self._cosine + first * self._sine), dim=-1
        )

    def _store(self, layer: int, side: int, heads: torch.Tensor) -> None:
        """Write [N, K, D] float32 into the plan's slots."""
        page_tokens = self._blocks.shape[1] // self._shape.head_dim
        lines = self._key_lines + (layer * 2 + side) * self._shape.num_kv_heads * page_tokens
        finite = torch.nan_to_num(heads, nan=0.0, posinf=0.0, neginf=0.0).clamp_(-_FINITE_MAX, _FINITE_MAX)
        self._lines[lines.view(-1)] = finite.view(-1, self._shape.head_dim).to(self._lines.dtype)

    def _store_lines(self, batch: TokenBatch) -> torch.Tensor:
        """Line numbers of layer 0's keys, [N, K]."""
        slots = self._tensor(batch.slots)
        pages, offsets = slots // batch.page_tokens, slots % batch.page_tokens
        lines = self._page_blocks * pages * batch.page_tokens + offsets
        return lines[:, None] + self._head_numbers * batch.page_tokens

    # ---- preparation, once per plan and window ---------------------------------------------------------------------

    def _plan(self, batch: TokenBatch, window: int | None) -> _Work:
        lengths = np.diff(batch.offsets)
        singles = np.flatnonzero(lengths == 1)
        extends = np.flatnonzero(lengths > 1)
        return _Work(
            tuple(self._plan_singles(batch, rows, window) for rows in self._alike(batch, singles, window)),
            tuple(self._plan_extend(batch, int(row), window) for row in extends),
        )

    def _alike(self, batch: TokenBatch, rows: np.ndarray, window: int | None) -> Iterator[np.ndarray]:
        """Cut rows into groups that waste at most half of what is gathered, and gather no more than the bound."""
        first, last = _page_range(batch, rows, window)
        counts = last - first
        classes = np.ceil(np.log2(counts)).astype(np.int64)
        for size_class in np.unique(classes):
            members = rows[classes == size_class]
            page_elements = self._blocks.shape[1] * self._shape.num_kv_heads
            at_once = max(1, _GROUP_ELEMENTS // (page_elements << int(size_class)))
            for start in range(0, len(members), at_once):
                yield members[start : start + at_once]

    def _plan_singles(self, batch: TokenBatch, rows: np.ndarray, window: int | None) -> _SingleRows:
        first, last = _page_range(batch, rows, window)
        columns = first[:, None] + np.arange(int((last - first).max()))
        pages = batch.page_table[rows[:, None], np.minimum(columns, batch.page_table.shape[1] - 1)]
        slots = np.arange(batch.page_tokens)
        keys = (columns[:, :, None] * batch.page_tokens + slots).reshape(len(rows), -1)
        own = batch.starts[rows][:, None]
        visible = (keys <= own) & (keys > own - (window or own.max() + 1))
        return _SingleRows(
            self._tensor(batch.offsets[rows]), self._page_to_blocks(pages), self._mask(visible)[:, None, None, :]
        )

    def _plan_extend(self, batch: TokenBatch, row: int, window: int | None) -> _ExtendRow:
        start, num_tokens = int(batch.starts[row]), int(batch.offsets[row + 1] - batch.offsets[row])
        first_page = 0 if window is None else max(0, start - window + 1) // batch.page_tokens
        last_page = -(-(start + num_tokens) // batch.page_tokens)
        origin = first_page * batch.page_tokens  # position of the first gathered key
        pieces = []
        for begin in range(0, num_tokens, _QUERY_BLOCK):
            end = min(begin + _QUERY_BLOCK, num_tokens)
            low = 0 if window is None else max(0, start + begin - window + 1)
            keys = slice(low - origin, start + end - origin)
            mask = None
            if start + begin > 0 or (window is not None and end > window):
                own = np.arange(start + begin, start + end)[:, None]
                positions = np.arange(low, start + end)
                mask = self._mask((positions <= own) & (positions > own - (window or start + end)))
            pieces.append((slice(begin, end), keys, mask))
        pages = batch.page_table[row, first_page:last_page]
        tokens = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        return _ExtendRow(tokens, self._page_to_blocks(pages), tuple(pieces))

    def _page_to_blocks(self, pages: np.ndarray) -> torch.Tensor:
        """Pages [..., pages] -> block numbers [..., K, pages] of layer 0's keys."""
        numbers = self._tensor(pages) * self._page_blocks
        return numbers.unsqueeze(-2) + self._head_numbers[:, None]

    def _mask(self, visible: np.ndarray) -> torch.Tensor:
        mask = torch.zeros(visible.shape, dtype=self._dtype)
        return mask.masked_fill_(torch.from_numpy(~visible), float("-inf")).to(self._device)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


def _page_range(batch: TokenBatch, rows: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """First page and the one after the last that rows of one token attend to."""
    own = batch.starts[rows]
    first = np.zeros_like(own) if window is None else np.maximum(0, own - window + 1) // batch.page_tokens
    return first, own // batch.page_tokens + 1

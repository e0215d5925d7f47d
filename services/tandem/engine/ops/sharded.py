"""Operators whose weights are shared out between tensor ranks: what each rank computes, and how it becomes one."""

from __future__ import annotations

import torch

from tandem.engine.ops.contract import Embedding, Reduction


class VocabularyEmbedding:
    """A table of which this rank has the rows `rows` of [0, vocabulary). See `contract.Embedding`."""

    def __init__(self, table: Embedding, rows: range, vocabulary: int, reduction: Reduction) -> None:
        self._table = table
        self._rows = rows
        self._vocabulary = vocabulary
        self._reduction = reduction

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        if bool(((token_ids < 0) | (token_ids >= self._vocabulary)).any()):  # on every rank alike
            raise IndexError(f"a token id is not in [0, {self._vocabulary})")
        own = (token_ids >= self._rows.start) & (token_ids < self._rows.stop)
        vectors = self._table(torch.where(own, token_ids - self._rows.start, 0))
        vectors[~own] = 0
        residual = torch.zeros_like(vectors)
        self._reduction.add_to(residual, vectors)
        return residual

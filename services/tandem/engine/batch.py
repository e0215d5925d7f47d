"""Turns a plan into arrays: which token stands where, and which tokens only the device knows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from tandem.core.messages.plans import Plan
from tandem.engine.ops.contract import TokenBatch


@dataclass(frozen=True, slots=True)
class PlanTokens:
    """A plan's tokens. Host arrays, int64.

    `token_ids` [N] has zeros at `unseen` [u], whose ids are the last ones sampled for `unseen_slots` [u].
    """

    batch: TokenBatch
    token_ids: np.ndarray
    unseen: np.ndarray
    unseen_slots: np.ndarray


def build_batch(plan: Plan, page_tokens: int) -> PlanTokens:
    """Lay a plan's rows one after another. Asserts that they are well formed."""
    rows = plan.rows
    lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    offsets = np.array([0, *accumulate(row.num_tokens for row in rows)], dtype=np.int64)
    num_pages = -(-(starts + lengths) // page_tokens)
    page_table = np.zeros((len(rows), int(num_pages.max())), dtype=np.int64)
    token_ids = np.zeros(int(offsets[-1]), dtype=np.int64)
    unseen = []
    for number, row in enumerate(rows):
        assert row.num_tokens == (len(row.token_ids) or 1), row
        page_table[number, : num_pages[number]] = row.pages[: num_pages[number]]
        if row.token_ids:
            token_ids[offsets[number] : offsets[number + 1]] = row.token_ids
        else:
            unseen.append(number)
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(len(token_ids)) + (starts - offsets[:-1])[row_of_token]
    slots = page_table[row_of_token, positions // page_tokens] * page_tokens + positions % page_tokens
    batch = TokenBatch(
        page_tokens=page_tokens,
        offsets=offsets,
        starts=starts,
        positions=positions,
        slots=slots,
        page_table=page_table,
    )
    return PlanTokens(
        batch, token_ids, offsets[unseen], np.array([rows[number].slot for number in unseen], dtype=np.int64)
    )

"""Log-probabilities of the raw model distribution, as results carry them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem.core.messages.sampling import TokenLogprob
from tandem.engine.ordering import top_values

_CHUNK_ELEMENTS = 1 << 20  # logits worked on at a time: bounds the temporaries
_SLACK = 32  # more candidates than asked for, so that equal values at the end seldom leave the order open


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """Describe one token of each row and the row's `num_top[i]` most likely ones.

    logits [n, vocabulary] float32, raw; token_ids [n] int64 on the same device. NaN counts as impossible.
    """
    at_once = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = (slice(start, start + at_once) for start in range(0, len(num_top), at_once))
    return [one for part in parts for one in _describe(logits[part], token_ids[part], num_top[part])]


def _describe(logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    safe = torch.nan_to_num(logits, nan=float("-inf"), posinf=torch.finfo(logits.dtype).max, neginf=float("-inf"))
    normalizer = safe.logsumexp(dim=-1, keepdim=True)
    chosen = (safe.gather(-1, token_ids[:, None]) - normalizer)[:, 0].tolist()
    widest = max(num_top, default=0)
    if widest == 0:
        return [TokenLogprob(token, _finite(value)) for token, value in zip(token_ids.tolist(), chosen, strict=True)]
    values, indices, certain = top_values(safe, widest + _SLACK)
    all_values, all_indices = (values - normalizer).tolist(), indices.tolist()
    result = []
    for row, (token, wanted) in enumerate(zip(token_ids.tolist(), num_top, strict=True)):
        row_values, row_indices = all_values[row], all_indices[row]
        if wanted > certain[row]:
            exact, order, _ = top_values(safe[row : row + 1], safe.shape[-1])
            row_values, row_indices = (exact - normalizer[row])[0, :wanted].tolist(), order[0, :wanted].tolist()
        pairs = zip(row_indices[:wanted], row_values[:wanted], strict=True)
        top = tuple((index, _finite(value)) for index, value in pairs)
        result.append(TokenLogprob(token, _finite(chosen[row]), top))
    return result


def _finite(value: float) -> float:
    """A float that every wire form can carry; -9999 stands for impossible."""
    return value if value > -9999.0 else -9999.0

"""Log-probabilities of the raw distribution."""

from __future__ import annotations

import math

import pytest
import torch

from tandem.engine.logprobs import token_logprobs


def test_against_log_softmax() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 3
    tokens = torch.tensor([0, 7, 299, 12, 12])
    expected = torch.log_softmax(logits.double(), dim=-1)
    described = token_logprobs(logits, tokens, [0, 1, 5, 0, 400])
    for row, (entry, num_top) in enumerate(zip(described, [0, 1, 5, 0, 300], strict=True)):
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-4)
        best = expected[row].sort(descending=True)
        assert [token for token, _ in entry.top] == best.indices[:num_top].tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values[:num_top].tolist(), abs=1e-4)


def test_equal_values_come_by_rising_id() -> None:
    logits = torch.zeros(2, 500)
    logits[1, 400:] = 1.0
    first, second = token_logprobs(logits, torch.tensor([3, 3]), [4, 2])
    assert [token for token, _ in first.top] == [0, 1, 2, 3]
    assert [token for token, _ in second.top] == [400, 401]


def test_broken_rows_give_finite_numbers() -> None:
    logits = torch.zeros(4, 50)
    logits[0] = math.nan
    logits[1, 4] = math.inf
    logits[2] = -math.inf
    for entry in token_logprobs(logits, torch.tensor([1, 4, 2, 3]), [2, 2, 2, 2]):
        assert entry.logprob is not None
        assert all(math.isfinite(value) for value in (entry.logprob, *(value for _, value in entry.top)))

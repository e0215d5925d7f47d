"""The sampler: supports, distributions, penalties, and that a row's token is its own affair."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.messages.plans import Sample
from tandem.core.messages.sampling import SamplingParams
from tandem.engine import sampler
from tandem.engine.sampler import sample_tokens
from tandem.engine.uniforms import uniforms

VOCABULARY = 700  # more than the sampler's candidates, so that both of its ways are taken
DRAWS = 400

params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0, 1e-7]),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 0.0]),
    top_k=st.sampled_from([0, 1, 5, 300, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (5, -100.0)), ((699, 100.0),)]),
    seed=st.integers(-(2**63), 2**64),
)


def make_logits(rows: int, seed: int, *, rounded: bool = False) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(0.0, 2.0, (rows, VOCABULARY)).astype(np.float32)
    return torch.from_numpy(np.round(values * 2) / 2 if rounded else values)  # rounded: hundreds of equal values


def make_sample(params: SamplingParams, index: int = 0, banned: tuple[int, ...] = ()) -> Sample:
    history = (1, 2, 2, 650, 3, 3, 3) if params.needs_history else ()
    return Sample(params=params, output_index=index, banned=banned, history=history, num_prompt=3 if history else 0)


def draws(logits: torch.Tensor, count: int = DRAWS, **settings_: Any) -> list[int]:
    """Tokens that one row of logits gives for `count` output indices."""
    params = SamplingParams(seed=settings_.pop("seed", 1234), **settings_)
    return sample_tokens(logits.expand(count, -1), [make_sample(params, index) for index in range(count)]).tolist()


def naive_support(logits: torch.Tensor, params: SamplingParams) -> list[int]:
    """The tokens that may be drawn, in falling order, after the definition: min_p, then top_k, then top_p."""
    scaled = logits.double().numpy() / params.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = [int(t) for t in np.argsort(-probabilities, kind="stable")]
    order = [token for token in order if probabilities[token] >= params.min_p * probabilities[order[0]]]
    order = order[: params.top_k] if params.top_k else order
    total, before = probabilities[order].sum(), 0.0
    support: list[int] = []
    for token in order:
        if support and before >= params.top_p * total:
            break
        support.append(token)
        before += probabilities[token]
    return support


@settings(max_examples=60)
@given(st.lists(params_strategy, min_size=1, max_size=6), st.integers(0, 1000), st.booleans())
def test_a_row_does_not_depend_on_its_batch(batch: list[SamplingParams], seed: int, rounded: bool) -> None:
    logits = make_logits(len(batch), seed, rounded=rounded)
    before = logits.clone()
    samples = [make_sample(params, index, (0, 8)) for index, params in enumerate(batch)]
    together = sample_tokens(logits, samples).tolist()
    alone = [sample_tokens(logits[row : row + 1], [sample]).item() for row, sample in enumerate(samples)]
    turned = sample_tokens(logits.flip(0), samples[::-1]).flip(0).tolist()
    assert together == alone == turned
    assert torch.equal(logits, before)
    assert not {0, 8} & set(together)


def test_chunks_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(7, 1)
    samples = [make_sample(SamplingParams(seed=row, top_p=0.9)) for row in range(7)]
    whole = sample_tokens(logits, samples)
    monkeypatch.setattr(sampler, "_CHUNK_ELEMENTS", {"cpu": 2 * VOCABULARY})
    assert torch.equal(sample_tokens(logits, samples), whole)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 300},
        {"top_p": 0.3},
        {"top_p": 0.97},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.6, "min_p": 0.01, "temperature": 1.7},
        {"top_k": 400, "top_p": 0.99, "temperature": 5.0},
        {"top_k": 300, "top_p": 0.4, "temperature": 3.0},
        {"top_k": 250, "temperature": 9.0},
    ],
    ids=str,
)
def test_support(params: dict[str, Any], rounded: bool) -> None:
    logits = make_logits(1, 3, rounded=rounded)[0]
    support = naive_support(logits, SamplingParams(**params))
    drawn = draws(logits, 3000, **params)
    assert set(drawn) <= set(support)
    if len(support) <= 10:
        assert set(drawn) == set(support)  # each of them is likely enough to turn up


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9}],
    ids=str,
)
def test_distribution(params: dict[str, Any]) -> None:
    """Chi-square of 20,000 draws over the eleven likeliest tokens and all others together."""
    logits = make_logits(1, 5)[0] * 1.5
    count = 20_000
    resolved = SamplingParams(**params)
    support = naive_support(logits, resolved)
    scaled = logits.double() / resolved.temperature
    probabilities = torch.softmax(scaled[support], dim=0).numpy()
    drawn = draws(logits, count, **params)
    observed = np.array([drawn.count(token) for token in support[:11]])
    expected = probabilities[:11] * count
    if len(support) > 11:
        observed = np.append(observed, count - observed.sum())
        expected = np.append(expected, count - expected.sum())
    assert observed.sum() == count
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 11 degrees of freedom: exceeded once in a thousand, and the seed is fixed


def test_seed_and_index_decide() -> None:
    logits = make_logits(1, 8)[0]
    assert draws(logits, seed=5) == draws(logits, seed=5)
    assert draws(logits, seed=5) != draws(logits, seed=6)
    backwards = [make_sample(SamplingParams(seed=5), index) for index in reversed(range(DRAWS))]
    assert sample_tokens(logits.expand(DRAWS, -1), backwards).tolist() == draws(logits, seed=5)[::-1]


def test_inverse_of_the_cumulative_distribution() -> None:
    """Without filters the sum runs over token ids, with them over falling probabilities: either is fixed."""
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    numbers = uniforms([9] * 200, range(200))
    by_id = np.searchsorted(np.cumsum([0.1, 0.4, 0.2, 0.3]), numbers, side="right").tolist()
    assert draws(logits, 200, seed=9) == by_id
    order = [1, 3, 2]
    by_rank = np.searchsorted(np.cumsum([4 / 9, 3 / 9, 2 / 9]), numbers, side="right")
    assert draws(logits, 200, seed=9, top_k=3) == [order[rank] for rank in by_rank]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[0, [40, 90]] = 1.0
    greedy = make_sample(SamplingParams(temperature=0.0))
    assert sample_tokens(logits, [greedy, greedy]).tolist() == [40, 0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"min_p": 0.2}], ids=str)
def test_a_broken_row_disturbs_nobody(broken: float, params: dict[str, Any]) -> None:
    logits = make_logits(3, 9)
    samples = [make_sample(SamplingParams(seed=row, **params)) for row in range(3)]
    healthy = sample_tokens(logits, samples).tolist()
    logits[1] = broken
    result = sample_tokens(logits, samples).tolist()
    assert [result[0], result[2]] == [healthy[0], healthy[2]]
    assert 0 <= result[1] < VOCABULARY
    logits[1] = -1.0
    logits[1, 77] = math.nan
    logits[1, 78] = 4.0
    assert sample_tokens(logits, [replace(samples[1], params=SamplingParams(temperature=0.0))] * 3)[1] == 78


def test_everything_banned_still_gives_a_token() -> None:
    sample = make_sample(SamplingParams(top_k=3), banned=tuple(range(VOCABULARY)))
    assert 0 <= sample_tokens(make_logits(1, 2), [sample]).item() < VOCABULARY


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias=((VOCABULARY + 5, 9.0),))
    sample = Sample(params=params, output_index=0, banned=(VOCABULARY,), history=(VOCABULARY, 4), num_prompt=1)
    assert 0 <= sample_tokens(make_logits(1, 2), [sample]).item() < VOCABULARY


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.integers(0, 40),
    st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    st.sampled_from([-1.0, 0.0, 0.6]),
    st.sampled_from([-0.4, 0.0, 0.9]),
    st.integers(0, 100),
)
def test_penalties(
    history: list[int], num_prompt: int, repetition: float, presence: float, frequency: float, seed: int
) -> None:
    """Against the definition, token by token: greedy over penalised logits."""
    logits = make_logits(1, seed)[:, :31]
    expected = logits[0].tolist()
    output = history[num_prompt:]
    for token in range(31):
        if token in history:
            expected[token] *= repetition if expected[token] <= 0 else 1 / repetition
        expected[token] -= presence * (token in output) + frequency * output.count(token)
    params = SamplingParams(
        temperature=0.0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    sample = Sample(params=params, output_index=0, history=tuple(history), num_prompt=num_prompt)
    assert expected[int(sample_tokens(logits, [sample]))] == pytest.approx(max(expected), abs=1e-5)


def test_bias_and_bans() -> None:
    logits = make_logits(1, 4)
    best = int(logits.argmax())
    greedy = SamplingParams(temperature=0.0)
    assert sample_tokens(logits, [make_sample(greedy, banned=(best,))]).item() != best
    biased = replace(greedy, logit_bias=((17, 100.0),))
    assert sample_tokens(logits, [make_sample(biased)]).item() == 17
    assert sample_tokens(logits, [make_sample(biased, banned=(17,))]).item() == best

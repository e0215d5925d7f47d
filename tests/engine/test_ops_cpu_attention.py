"""Rope, the paged pool and attention in C++ against the plain ones; slots that nobody filled hold NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.ops.contract import AttentionStep, HeadNorms, TokenBatch
from tandem.engine.ops.reference import ReferenceOperators
from tandem.engine.ops.reference_attention import ReferenceAttention
from tests.engine.ops_cpu_cases import (
    BF16_UNIT,
    PAIRED_KERNELS,
    UNIT,
    attention_shape,
    every_kernel,
    generator,
    operators,
    plan,
)

REFERENCE = ReferenceOperators(torch.float32)
LAYERS = 2
ROWS = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(0, 40), st.integers(200, 700)),
        st.one_of(st.just(1), st.integers(2, 40), st.integers(250, 300)),
    ),
    min_size=1,
    max_size=5,
)


def poisoned_pool(
    batch: TokenBatch, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator
) -> torch.Tensor:
    """[page, layer, 2, K, slot, D] with NaN in every slot that no row of the plan may read."""
    pool = torch.randn(shape, generator=random).to(dtype)
    used = torch.zeros(shape[0], shape[4], dtype=torch.bool)
    for row, start in enumerate(batch.starts):
        for position in range(int(start + batch.offsets[row + 1] - batch.offsets[row])):
            page = batch.page_table[row, position // batch.page_tokens]
            used[page, position % batch.page_tokens] = True
    pool.permute(0, 4, 1, 2, 3, 5)[~used] = float("nan")
    return pool


def attention_bound(head_dim: int, num_keys: int, queries: torch.Tensor, keys_max: float, values_max: float) -> float:
    """Scores are off by a dot product's roundings, weights by twice that and the exponential's; then the sums."""
    size = float(queries.norm(dim=-1).max()) * keys_max / math.sqrt(head_dim)
    scores = 2 * (head_dim + 4) * UNIT * size
    return float(4 * (scores + (100 + 300 + num_keys) * UNIT) * values_max)


def check_attention(
    kernels: str, step: AttentionStep, layer: int, queries: torch.Tensor, result: torch.Tensor, bound: float
) -> None:
    """Against the plain step over the same pool. Dot products of bf16 round scaled queries and the softmax's weights:
    the plain step is given the former, the latter are off by one rounding each."""
    pool = step._blocks  # type: ignore[attr-defined]
    if kernels in PAIRED_KERNELS and pool.dtype == torch.bfloat16:
        scale = math.sqrt(queries.shape[-1])
        queries = (queries * torch.tensor(1 / scale)).bfloat16().float() * scale
        bound += BF16_UNIT * pool.abs().max().item()
    assert (result - step.attend(layer, queries)).abs().max() <= bound


@every_kernel
@given(
    ROWS,
    st.sampled_from([1, 3, 8, 16, 64]),
    st.sampled_from([(1, 1), (2, 7), (3, 1), (1, 13), (5, 3)]),
    st.sampled_from([8, 24, 32, 64, 80, 128]),
    st.sampled_from([None, 1, 5, 64, 300]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(max_examples=25, derandomize=True)
def test_plan(
    kernels: str,
    rows: list[tuple[int, int]],
    page_tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    normed: bool,
    seed: int,
) -> None:
    random = generator(seed)
    cpu = operators(kernels, 1 + seed % 4)
    shape = attention_shape(*heads, head_dim, (None, window))
    batch = plan(rows, page_tokens, seed=seed)
    pages = int(batch.page_table.max()) + 1
    pool = poisoned_pool(batch, (pages, LAYERS, 2, heads[0], page_tokens, head_dim), dtype, random)
    own, other = pool.clone(), pool.nan_to_num(nan=0.0)
    norms = HeadNorms(torch.randn(head_dim, generator=random), torch.randn(head_dim, generator=random), 1e-6)
    steps = cpu.begin(batch, own, shape), REFERENCE.begin(batch, other, shape)
    for layer in range(LAYERS):
        qkv = torch.randn(batch.num_tokens, (shape.num_heads + 2 * heads[0]) * head_dim, generator=random)
        queries, expected = (step.rope_and_store(layer, qkv, norms if normed else None) for step in steps)
        size = expected.abs().max().item() + 1.0
        assert (queries - expected).abs().max() <= (2 * head_dim + 24) * UNIT * 4 * size
        stored, written = own.nan_to_num(nan=0.0).float(), other.float()
        step_size = 2 * BF16_UNIT if dtype == torch.bfloat16 else 0.0
        keys_max = 4 * (written.abs().max().item() + 1.0)
        assert ((stored - written).abs() <= step_size * written.abs() + (2 * head_dim + 24) * UNIT * keys_max).all()
        other.copy_(own.nan_to_num(nan=0.0))  # from here on both attend to the same keys
        result = steps[0].attend(layer, queries)
        keys = stored[:, layer, 0].norm(dim=-1).max().item()
        values = stored[:, layer, 1].abs().max().item()
        num_keys = max(start + length for start, length in rows)
        bound = attention_bound(head_dim, num_keys, queries, keys, values)
        check_attention(kernels, steps[1], layer, queries, result, bound)
    assert torch.equal(own.isnan(), pool.isnan() & own.isnan())


@every_kernel
@pytest.mark.parametrize("window", [None, 37, 300])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160])
@pytest.mark.parametrize("heads", [(2, 1), (1, 7), (1, 8), (1, 13)], ids=str)
def test_tokens_one_by_one_are_the_prompt_bit_for_bit(
    kernels: str, heads: tuple[int, int], head_dim: int, window: int | None
) -> None:
    """Few rows take other ways through a head than many: single tokens and short chunks, in one plan and alone."""
    length, page_tokens = 700, 8
    random = generator(head_dim * heads[1])
    pages = torch.randperm(-(-length // page_tokens), generator=random).tolist()
    pool = torch.randn((len(pages), 1, 2, heads[0], page_tokens, head_dim), generator=random).bfloat16()
    shape = attention_shape(*heads, head_dim, (window,))
    queries = torch.randn(length, heads[0] * heads[1], head_dim, generator=random)
    prompt = operators(kernels).begin(plan([(0, length)], page_tokens, [pages]), pool, shape).attend(0, queries)
    singles = [(start, 1) for start in (0, 5, 31, 127, 255, 256, 300, 511, 530, 640, 699)]
    mixed = [*singles, (128, 2), (250, 9), (500, 3), (40, 1)]
    for num_threads, rows in ((1, mixed), (3, mixed[::-1]), (2, [(699, 1)]), (1, [(513, 2)])):
        batch = plan(rows, page_tokens, [pages] * len(rows))
        positions = torch.from_numpy(batch.positions)
        step = operators(kernels, num_threads).begin(batch, pool, shape)
        assert torch.equal(step.attend(0, queries[positions].contiguous()), prompt[positions])


@every_kernel
@pytest.mark.parametrize("window", [None, 4096])
def test_far_positions(kernels: str, window: int | None) -> None:
    """The end of a context of 32768 positions: decode and extend rows in one plan, one and several threads."""
    random = generator(7)
    shape = attention_shape(1, 2, 32, (window,))
    rows = [(32767, 1), (32700, 68), (4095, 1)]
    batch = plan(rows, 64)
    pool = torch.randn((int(batch.page_table.max()) + 1, 1, 2, 1, 64, 32), generator=random).bfloat16()
    qkv = torch.randn(batch.num_tokens, 4 * 32, generator=random)
    results = []
    for num_threads in (1, 3):
        own = pool.clone()
        step = operators(kernels, num_threads).begin(batch, own, shape)
        results.append(step.attend(0, queries := step.rope_and_store(0, qkv, None)))
    assert torch.equal(*results)
    bound = attention_bound(32, 32768, queries, own[:, :, 0].float().norm(dim=-1).max().item(), own.abs().max().item())
    check_attention(kernels, REFERENCE.begin(batch, own, shape), 0, queries, results[0], bound)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_values_are_stored_as_zero(kernels: str, dtype: torch.dtype) -> None:
    shape = attention_shape(1, 1, 8, (None,))
    batch = plan([(0, 3)], 4, pages=[[0]])
    pool = torch.zeros(1, 1, 2, 1, 4, 8, dtype=dtype)
    qkv = torch.ones(3, 24)
    qkv[0, 16:] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e18, 2.0, 0.0])
    qkv[1, 8] = float("nan")
    operators(kernels).begin(batch, pool, shape).rope_and_store(0, qkv, None)
    expected = torch.tensor([0.0, 0.0, 0.0, 1e18, -1e18, 1e18, 2.0, 0.0]).to(dtype)
    assert torch.equal(pool[0, 0, 1, 0, 0], expected)
    assert pool.isfinite().all()
    assert pool[0, 0, 0, 0, 1, 0] == 0.0


@every_kernel
@pytest.mark.parametrize("rows", [[(30, 1)], [(0, 20)]], ids=["decode", "prompt"])
def test_a_window_that_is_off_by_one_is_found(
    kernels: str, rows: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proof that the comparison above can fail: one position more is attended to on one of its sides."""

    def compare() -> None:
        test_plan.hypothesis.inner_test(kernels, rows, 8, (2, 1), 32, 5, torch.float32, False, 7)

    compare()
    original = ReferenceAttention._plan
    wider = lambda self, batch, window: original(self, batch, window and window + 1)  # noqa: E731
    monkeypatch.setattr(ReferenceAttention, "_plan", wider)
    with pytest.raises(AssertionError):
        compare()

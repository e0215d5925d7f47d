"""The C++ operators against the plain ones, within bounds that follow from the number of roundings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.ops.reference import ReferenceOperators
from tests.engine.ops_cpu_cases import BF16_UNIT, ROUNDING_KERNELS, UNIT, every_kernel, generator, operators

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**20)
QUICK = settings(max_examples=25, derandomize=True)
REFERENCE = ReferenceOperators(torch.float32)


def rounding_bound(depth: int, *, inputs_rounded: bool) -> float:
    """Relative to the sum of absolute products: of a blocked sum, plus any order of the reference's sum."""
    blocked = min(depth, 256) + -(-depth // 256) + 4
    return (blocked + depth + 4) * UNIT + (BF16_UNIT if inputs_rounded else 0.0)


@every_kernel
@given(
    st.integers(1, 300),
    st.integers(1, 700),
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    DTYPES,
    st.booleans(),
    SEEDS,
)
@QUICK
def test_linear(
    kernels: str, rows: int, depth: int, outputs: list[int], dtype: torch.dtype, biased: bool, seed: int
) -> None:
    random = generator(seed)
    cpu = operators(kernels, 1 + seed % 3)
    inputs = torch.randn(rows, depth, generator=random)
    weights = [torch.randn(count, depth, generator=random).to(dtype) for count in outputs]
    biases = [
        torch.randn(count, generator=random).to(dtype) if biased and number != 1 else None
        for number, count in enumerate(outputs)
    ]
    linear = cpu.linear(weights, biases)
    expected = REFERENCE.linear(weights, biases)(inputs)
    sizes = inputs.abs() @ torch.cat(weights).float().abs().t()
    if biased:
        sizes += torch.cat(
            [torch.zeros(n) if b is None else b.float().abs() for n, b in zip(outputs, biases, strict=True)]
        )
    bound = rounding_bound(depth, inputs_rounded=kernels in ROUNDING_KERNELS and dtype == torch.bfloat16) * (sizes + 1)
    result = linear(inputs)
    assert ((result - expected).abs() <= bound).all()
    for plain, given_weight in zip(linear.plain_weights(), weights, strict=True):
        assert torch.equal(plain, given_weight)
    total = torch.randn(rows, sum(outputs), generator=random)
    added = total.clone()
    linear.add_to(added, inputs)
    assert torch.equal(added, total + result)


@every_kernel
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 120), DTYPES, st.booleans(), SEEDS)
@QUICK
def test_gated_linear(
    kernels: str, rows: int, depth: int, outputs: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    """The activation of the very bits that the two linears give."""
    random = generator(seed)
    cpu = operators(kernels, 1 + seed % 3)
    inputs = torch.randn(rows, depth, generator=random)
    weights = [torch.randn(outputs, depth, generator=random).to(dtype) for _ in range(2)]
    biases = [torch.randn(outputs, generator=random) if biased else None for _ in range(2)]
    fused = cpu.gated_linear(weights, biases)
    gate, up = cpu.linear(weights, biases)(inputs).double().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).float()
    # The exponential is within 2 units in the last place; where it leaves float32's range the result is below 1e-30.
    assert ((fused(inputs) - expected).abs() <= 12 * UNIT * expected.abs() + 1e-30 * inputs.abs().max()).all()
    for plain, given_weight in zip(fused.plain_weights(), weights, strict=True):
        assert torch.equal(plain, given_weight)


@every_kernel
@given(st.integers(1, 300), st.integers(1, 500), SEEDS)
@QUICK
def test_rms_norm(kernels: str, rows: int, width: int, seed: int) -> None:
    random = generator(seed)
    cpu = operators(kernels, 1 + seed % 3)
    residual = torch.randn(rows, width, generator=random) * 10.0 ** (seed % 5 - 2)
    weight = torch.randn(width, generator=random)
    result = cpu.rms_norm(residual, weight, 1e-6)
    expected = REFERENCE.rms_norm(residual, weight, 1e-6)
    assert ((result - expected).abs() <= (2 * width + 16) * UNIT * expected.abs()).all()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding(kernels: str, dtype: torch.dtype, tied: bool) -> None:
    cpu = operators(kernels, 2)
    table = torch.randn(83, 37, generator=generator(1)).to(dtype)
    embedding = cpu.tied_embedding(table)[0] if tied else cpu.embedding(table)
    token_ids = torch.randint(0, 83, (211,), generator=generator(2))
    assert torch.equal(embedding(token_ids), REFERENCE.embedding(table)(token_ids))
    for wrong in (-1, 83):
        with pytest.raises(IndexError):
            embedding(torch.tensor([0, wrong]))


@every_kernel
def test_a_broken_row_stays_alone(kernels: str) -> None:
    """Values that are not finite in one row's inputs reach no other row."""
    cpu = operators(kernels, 2)
    weights = torch.randn(70, 300, generator=generator(3)).bfloat16()
    linear = cpu.linear((weights,), (None,))
    inputs = torch.randn(40, 300, generator=generator(4))
    expected = linear(inputs)
    inputs[7, 5], inputs[20] = float("nan"), float("inf")
    result = linear(inputs)
    others = [row for row in range(40) if row not in (7, 20)]
    assert torch.equal(result[others], expected[others])
    assert result[7].isnan().all()


@every_kernel
def test_no_rows(kernels: str) -> None:
    cpu = operators(kernels, 2)
    linear = cpu.linear((torch.ones(5, 4),), (None,))
    assert linear(torch.empty(0, 4)).shape == (0, 5)
    assert cpu.rms_norm(torch.empty(0, 4), torch.ones(4), 1e-6).shape == (0, 4)


@every_kernel
def test_results_belong_to_the_caller(kernels: str) -> None:
    """Recycled memory is given to nobody while a view of it is alive."""
    cpu = operators(kernels)
    linear = cpu.linear((torch.randn(512, 64, generator=generator(5)),), (None,))
    kept = []
    for number in range(6):
        inputs = torch.randn(300, 64, generator=generator(number))
        kept.append((linear(inputs)[10:20], linear(inputs)[10:20].clone()))
        linear(inputs)
    assert all(torch.equal(view, copy) for view, copy in kept)
    assert 0 < cpu.workspace_bytes < 64 << 20

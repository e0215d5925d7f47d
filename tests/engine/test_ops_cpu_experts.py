"""Experts by the C++ operators: the operators one by one, the plain ones, and the bits of a row in any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.ops.composed import ComposedExperts, route
from tandem.engine.ops.contract import ExpertWeights, Routing
from tandem.engine.ops.cpu import CpuOperators
from tandem.engine.ops.cpu_experts import CpuExperts
from tandem.engine.ops.reference import ReferenceOperators
from tests.engine.ops_cpu_cases import UNIT, every_kernel, generator, operators

QUICK = settings(max_examples=25, derandomize=True)
THREADS = (1, 2, 3, 5)
HIDDEN, MIDDLE = 90, 72


def make_experts(count: int, hidden: int, middle: int, dtype: torch.dtype, seed: int) -> list[ExpertWeights]:
    random = generator(seed)
    shapes = ((middle, hidden), (middle, hidden), (hidden, middle))
    return [
        ExpertWeights(*((torch.randn(shape, generator=random) / shape[1] ** 0.5).to(dtype) for shape in shapes))
        for _ in range(count)
    ]


def clear_choices(logits: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Rows [N] in which the last chosen expert is clearly ahead of the first that is not."""
    ordered = logits.double().softmax(dim=-1).sort(dim=-1, descending=True).values
    if routing.experts_per_token == logits.shape[1]:
        return torch.ones(len(logits), dtype=torch.bool)
    last, following = ordered[:, routing.experts_per_token - 1], ordered[:, routing.experts_per_token]
    return last - following > 1e-4 * last


@every_kernel
@given(
    st.integers(1, 300),
    st.integers(1, 150),
    st.integers(1, 90),
    st.integers(1, 20),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**20),
)
@QUICK
def test_experts(
    kernels: str,
    rows: int,
    hidden: int,
    middle: int,
    num_experts: int,
    per_token: int,
    dtype: torch.dtype,
    normalized: bool,
    seed: int,
) -> None:
    """The bits of each expert's linears; weights within some roundings, as exponentials are another library's."""
    random = generator(seed)
    cpu = operators(kernels, 1 + seed % 3)
    routing = Routing(experts_per_token=min(per_token, num_experts), normalized=normalized, here=range(num_experts))
    router = torch.randn(num_experts, hidden, generator=random)
    experts = make_experts(num_experts, hidden, middle, dtype, seed)
    inputs = torch.randn(rows, hidden, generator=random)
    fused = cpu.experts(router, experts, routing)
    logits = cpu.linear((router,), (None,))
    clear = clear_choices(logits(inputs), routing)
    one_by_one = ComposedExperts(cpu, logits, experts, routing)(inputs)
    result = fused(inputs)
    sizes = sum(
        cpu.linear((one.down,), (None,))(cpu.gated_linear((one.gate, one.up), (None, None))(inputs)).abs()
        for one in experts
    )
    assert ((result - one_by_one).abs() <= 32 * UNIT * sizes)[clear].all()
    if dtype == torch.float32:
        plain = ReferenceOperators(torch.float32).experts(router, experts, routing)(inputs)
        assert torch.allclose(result[clear], plain[clear], rtol=1e-3, atol=1e-4)
    total = torch.randn(rows, hidden, generator=random)
    added = total.clone()
    fused.add_to(added, inputs)
    assert torch.equal(added, total + result)


def test_the_plain_choice_is_that_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    class Settings:
        num_experts_per_tok, num_local_experts, num_experts, hidden_size = 3, 11, 11, 16
        norm_topk_prob = False

    inputs = torch.randn(50, 16, generator=generator(1))
    for module, normalized in ((MixtralTopKRouter, True), (Qwen3MoeTopKRouter, False)):
        router = module(Settings())
        with torch.no_grad():
            router.weight.copy_(torch.randn(11, 16, generator=generator(2)))
            logits, weights, numbers = router(inputs)
        routing = Routing(experts_per_token=3, normalized=normalized, here=range(11))
        own_numbers, own_weights = route(logits, routing)
        assert torch.equal(own_numbers, numbers)
        assert torch.allclose(own_weights, weights, rtol=1e-6)


def prepared(cpu: CpuOperators, dtype: torch.dtype, *, spread: float = 1.0, here: range | None = None) -> CpuExperts:
    router = torch.randn(10, HIDDEN, generator=generator(3)) * spread
    routing = Routing(experts_per_token=3, normalized=True, here=here or range(10))
    experts = make_experts(10, HIDDEN, MIDDLE, dtype, 4)
    return cpu.experts(router, [experts[number] for number in routing.here], routing)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alike", [False, True])
def test_rows(kernels: str, dtype: torch.dtype, alike: bool) -> None:
    """A row's bits in every batch, on any number of threads; `alike`: nearly all rows go to the same experts."""
    inputs = torch.randn(700, HIDDEN, generator=generator(5))
    if alike:
        inputs = inputs * 0.05 + torch.randn(HIDDEN, generator=generator(6))
    expected: torch.Tensor | None = None
    for num_threads in THREADS:
        experts = prepared(operators(kernels, num_threads), dtype)
        if expected is None:
            expected = torch.cat([experts(inputs[row : row + 1]) for row in range(len(inputs))])
        for count in (*range(2, 30, 3), 239, 300, 700):
            first = (count * 37) % (len(inputs) - count + 1)
            assert torch.equal(experts(inputs[first : first + count]), expected[first : first + count]), count


@every_kernel
def test_workspace_can_be_taken_before(kernels: str) -> None:
    cpu = operators(kernels, 2)
    experts = prepared(cpu, torch.bfloat16)
    experts.reserve(3000)
    taken = cpu.workspace_bytes
    assert taken > 3000 * 3 * 4 * (HIDDEN + MIDDLE)
    experts.add_to(torch.zeros(3000, HIDDEN), torch.randn(3000, HIDDEN))
    assert cpu.workspace_bytes == taken


@every_kernel
def test_a_part_of_the_experts(kernels: str) -> None:
    """Parts add up to the whole; a row whose experts are elsewhere gets nothing."""
    cpu = operators(kernels, 2)
    inputs = torch.randn(120, HIDDEN, generator=generator(7))
    whole = prepared(cpu, torch.float32)
    parts = [prepared(cpu, torch.float32, here=here) for here in (range(4), range(4, 5), range(5, 10))]
    results = [part(inputs) for part in parts]
    assert torch.allclose(torch.stack(results).sum(dim=0), whole(inputs), atol=1e-5)
    missed = (results[1] == 0).all(dim=1)
    assert 0 < int(missed.sum()) < 120


@every_kernel
def test_a_broken_row_stays_alone(kernels: str) -> None:
    experts = prepared(operators(kernels, 2), torch.bfloat16)
    inputs = torch.randn(40, HIDDEN, generator=generator(8))
    expected = experts(inputs)
    inputs[7, 5], inputs[20], inputs[21] = float("nan"), float("inf"), -1e38
    others = [row for row in range(40) if row not in (7, 20, 21)]
    result = experts(inputs)
    assert torch.equal(result[others], expected[others])
    assert result[7].isnan().all()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_can_be_read_back(kernels: str, dtype: torch.dtype) -> None:
    cpu = operators(kernels, 2)
    experts = make_experts(3, 35, 21, dtype, 9)
    packed = cpu.experts(torch.randn(3, 35), experts, Routing(experts_per_token=1, normalized=True, here=range(3)))
    for number, one in enumerate(experts):
        plain = packed.plain_weights(number)
        assert torch.equal(plain.gate, one.gate) and torch.equal(plain.up, one.up)
        assert torch.equal(plain.down, one.down)
    assert packed(torch.empty(0, 35)).shape == (0, 35)

"""The budget of a plan, and fences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.policy import Fences, PlanBudget

A, B = b"a", b"b"


def test_budget_is_the_count_until_a_rate_is_known() -> None:
    assert PlanBudget(512, 0.2).tokens() == 512


def test_budget_follows_the_measured_rate() -> None:
    budget = PlanBudget(4096, 0.2)
    budget.measured(1000, 2, 1.0)
    assert budget.tokens() == 200
    for _ in range(40):
        budget.measured(2000, 2, 1.0)
    assert 395 <= budget.tokens() <= 400


def test_the_count_bounds_a_fast_device_and_no_time_bound_is_none() -> None:
    budget = PlanBudget(64, 0.2)
    budget.measured(1000, 1, 0.001)
    assert budget.tokens() == 64
    unbounded = PlanBudget(4096, 0.0)
    unbounded.measured(1000, 1, 1000.0)
    assert unbounded.tokens() == 4096


def test_plans_of_decode_rows_alone_do_not_say_what_prompts_cost() -> None:
    budget = PlanBudget(512, 0.2)
    budget.measured(4, 4, 0.1)
    assert budget.tokens() == 512
    budget.measured(1000, 1, 1.0)
    budget.measured(4, 4, 1.0)
    assert budget.tokens() == 200


def test_a_device_without_a_clock_teaches_nothing() -> None:
    budget = PlanBudget(512, 0.2)
    budget.measured(100, 1, 0.0)
    assert budget.tokens() == 512


@pytest.mark.parametrize("num_decode_rows", [0, 1, 200])
def test_one_slow_plan_is_not_for_ever(num_decode_rows: int) -> None:
    """A hiccup must not shrink plans so far that the rate is never learned again."""
    budget = PlanBudget(1024, 0.2)
    budget.measured(5, 1, 30.0)
    assert budget.tokens() >= 1
    rate = 2000.0
    for _ in range(60):
        prompt_tokens = max(1, budget.tokens() - num_decode_rows)
        count = prompt_tokens + num_decode_rows
        budget.measured(count, 1 + num_decode_rows, count / rate)
    assert budget.tokens() >= 0.8 * rate * 0.2


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 300), st.floats(0, 10))))
def test_budget_stays_within_its_bounds(plans: list[tuple[int, int, float]]) -> None:
    budget = PlanBudget(300, 0.2)
    for num_tokens, num_rows, seconds in plans:
        budget.measured(num_tokens, num_rows, seconds)
        assert 1 <= budget.tokens() <= 300


def test_fence_after_faults_in_a_row() -> None:
    fences = Fences(3, 10.0)
    fences.fault(A, 0.0)
    fences.fault(A, 1.0)
    assert not fences.is_fenced(A, 1.0)
    fences.fault(A, 2.0)
    fences.fault(B, 2.0)
    assert fences.fenced(2.0) == (A,)
    assert fences.is_fenced(A, 11.9)
    assert not fences.is_fenced(A, 12.0)
    assert fences.fenced(12.0) == ()


def test_a_success_forgets_faults() -> None:
    fences = Fences(2, 10.0)
    fences.fault(A, 0.0)
    fences.success(A)
    fences.fault(A, 0.0)
    assert not fences.is_fenced(A, 0.0)


def test_faults_while_fenced_prolong_the_fence() -> None:
    fences = Fences(1, 10.0)
    fences.fault(A, 0.0)
    fences.fault(A, 5.0)
    assert fences.is_fenced(A, 14.0)


def test_a_bounded_number_of_peers_is_remembered() -> None:
    fences = Fences(2, 10.0)
    for number in range(5000):
        fences.fault(number.to_bytes(4, "big"), 0.0)
    assert len(fences._faults) == 1024
    fences.fault((4999).to_bytes(4, "big"), 0.0)
    assert fences.is_fenced((4999).to_bytes(4, "big"), 0.0)
    for number in range(5000, 8000):
        for _ in range(2):
            fences.fault(number.to_bytes(4, "big"), 1.0)
    assert len(fences.fenced(1.0)) == 1024

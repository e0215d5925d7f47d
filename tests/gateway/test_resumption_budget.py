"""The bucket fills with time, up to its size, and never below zero."""

from __future__ import annotations

from tandem.gateway.resumption_budget import ResumptionBudget


def test_a_burst_and_then_a_rate() -> None:
    now = [100.0]
    budget = ResumptionBudget(3, 2.0, lambda: now[0])
    assert [budget.take() for _ in range(5)] == [True, True, True, False, False]
    now[0] += 0.4
    assert not budget.take()
    now[0] += 0.1
    assert [budget.take() for _ in range(2)] == [True, False]
    now[0] += 1000.0
    assert [budget.take() for _ in range(4)] == [True, True, True, False]


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    now = [100.0]
    budget = ResumptionBudget(1, 10.0, lambda: now[0])
    assert budget.take()
    now[0] -= 50.0
    assert not budget.take()
    now[0] += 0.1
    assert budget.take()

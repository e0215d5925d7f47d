"""Plans of pipelined loops: each takes its share, no request decodes in two of them, shares even out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import SchedulerConfig
from tandem.core.messages.plans import Row
from tandem.core.messages.requests import Cancel
from tandem.core.microbatches import CONTEXT_TOKENS, PROMPT_ROUNDS, Microbatches, row_cost, tokens_within
from tandem.core.states import State
from tests.core.rig import Rig, prompt_of


def pipelined(stages: int, *, budget: int = 1024, chunk: int = 1, **changes: Any) -> Rig:
    scheduler = SchedulerConfig(budget_tokens=budget, step_seconds_max=0.0, microbatch_tokens_min=chunk)
    return Rig(stages=stages, scheduler=scheduler, num_pages=400, **changes)


def decoding(rig: Rig, count: int, max_tokens: int = 60) -> None:
    """Bring requests 1..count to decode, with nothing in flight."""
    for number in range(1, count + 1):
        rig.submit(number, 3, max_tokens)
    while any(rig.request(number).state is not State.DECODING for number in range(1, count + 1)):
        rig.plan()
        rig.resolve()


def ids(rows: tuple[Row, ...]) -> list[int]:
    return [row.request_id for row in rows]


def fill(rig: Rig) -> None:
    """Plan as the loop does: until as many plans as stages are in flight."""
    while len(rig.in_flight) < rig.settings.stages and rig.plan():
        pass


def sizes(rig: Rig) -> list[int]:
    return [plan.num_tokens for plan in rig.in_flight]


@given(stages=st.integers(2, 6), count=st.integers(1, 23))
@settings(max_examples=30)
def test_decode_rows_are_divided_evenly_and_nobody_is_in_two_plans(stages: int, count: int) -> None:
    rig = pipelined(stages)
    decoding(rig, count)
    for _ in range(3 * stages):
        fill(rig)
        everybody = [request for plan in rig.in_flight for request in ids(plan.rows)]
        assert sorted(everybody) == list(range(1, count + 1)), "each of them in one plan"
        assert len(rig.in_flight) == min(stages, count)
        assert max(sizes(rig)) - min(sizes(rig)) <= 1
        rig.resolve()


def test_a_plan_that_was_too_large_is_not_repeated() -> None:
    """What one plan leaves over joins a smaller one, when many of another have ended."""
    rig = pipelined(3)
    decoding(rig, 12)
    fill(rig)
    assert sizes(rig) == [4, 4, 4]
    for number in (*ids(rig.in_flight[0].rows), ids(rig.in_flight[1].rows)[0]):
        rig.send(Cancel(number))
    for _ in range(6):
        rig.resolve()
        fill(rig)
    assert sum(sizes(rig)) == 7 and max(sizes(rig)) == 3, "seven are left"


def test_newcomers_are_spread() -> None:
    rig = pipelined(4)
    decoding(rig, 4)
    fill(rig)
    assert sizes(rig) == [1, 1, 1, 1]
    for number in range(5, 13):
        rig.submit(number, 1, 60)
    for _ in range(40):
        rig.resolve()
        fill(rig)
    assert sizes(rig) == [3, 3, 3, 3]


def test_nobody_is_left_out_for_long() -> None:
    rig = pipelined(4)
    decoding(rig, 11, max_tokens=80)
    before = [len(rig.outputs(number)) for number in range(1, 12)]
    for _ in range(4 * 30):
        fill(rig)
        rig.resolve()
    gained = [len(rig.outputs(number)) - before[number - 1] for number in range(1, 12)]
    assert max(gained) - min(gained) <= 1, gained


def test_one_long_prompt_fills_every_stage() -> None:
    """Its tokens are known, so its chunks chain; they are of one size, and not smaller than the least."""
    rig = pipelined(4, chunk=8, max_context_tokens=400)
    rig.submit(1, prompt_of(320), 2)
    fill(rig)
    assert len(rig.in_flight) == 4 and max(sizes(rig)) - min(sizes(rig)) <= 2
    assert sizes(rig)[0] == pytest.approx(320 / (4 * PROMPT_ROUNDS), abs=2)
    seen = 0
    while rig.in_flight:
        for row in rig.in_flight[0].rows:
            assert row.start == seen or row.sample is not None
            seen = max(seen, row.start + row.num_tokens)
            assert row.num_tokens >= 8 or row.sample is not None
        rig.resolve()
        fill(rig)
    assert len(rig.outputs(1)) == 2


def test_the_budget_bounds_a_share() -> None:
    rig = pipelined(2, budget=16, max_context_tokens=900)
    rig.submit(1, prompt_of(800), 2)
    fill(rig)
    assert sizes(rig) == [16, 16]


def test_a_prompt_goes_on_beside_decode_rows_and_plans_stay_even() -> None:
    rig = pipelined(4, max_context_tokens=400)
    decoding(rig, 8, max_tokens=90)
    rig.submit(9, prompt_of(64), 90)
    for _ in range(8):
        fill(rig)
        assert max(sizes(rig)) <= 2 + 64 / 4 / PROMPT_ROUNDS + 1
        assert all(len(plan.rows) >= 2 for plan in rig.in_flight), "two decode rows each, and a chunk"
        rig.resolve()


def test_prefix_hits_are_not_computed_again() -> None:
    rig = pipelined(2, chunk=4)
    rig.submit(1, prompt_of(24), 1)
    rig.run()
    rig.submit(2, prompt_of(24), 1)
    fill(rig)
    assert rig.in_flight[0].rows[0].start == 20, "the last page holds the token whose logits are needed"


def test_a_long_context_makes_plans_shorter() -> None:
    assert row_cost(CONTEXT_TOKENS, 10) > 1.9 * row_cost(0, 10)
    assert tokens_within(100.0, CONTEXT_TOKENS) == 50
    assert tokens_within(0.5, 10 * CONTEXT_TOKENS) == 1, "it always goes on"


def test_rows_far_above_the_others_begin_a_plan_of_their_own() -> None:
    share = Microbatches(2, 1).share([1.0] * 10 + [10.0], 0.0)
    assert share.takes(0.0, 100.0), "whoever is first goes, whatever it costs"
    assert share.takes(9.0, 1.0) and not share.takes(9.0, 10.0)


def test_without_stages_a_plan_takes_everything() -> None:
    rig = Rig(scheduler=SchedulerConfig(step_seconds_max=0.0))
    for number in range(1, 9):
        rig.submit(number, 3, 4)
    assert len(rig.plan()) == 8

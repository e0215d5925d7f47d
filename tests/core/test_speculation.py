"""Rows that are launched before the last token is known: how many, for whom, and at whose cost."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.core.messages.requests import EndReason
from tandem.core.states import State
from tests.core.rig import EOS, Rig


def decoding(max_tokens: int = 8, length: int = 5, *, chain: int = 2, rig: Rig | None = None, **sampling: Any) -> Rig:
    """Request 1 decodes; nothing is in flight and its last token is known."""
    rig = rig or Rig(chain=chain)
    rig.submit(1, length, max_tokens, **sampling)
    rig.step()
    assert rig.request(1).state is State.DECODING
    return rig


def test_the_next_row_is_launched_before_the_token_is_known() -> None:
    rig = decoding()
    (known,) = rig.plan()
    (speculative,) = rig.plan()
    assert (known.token_ids, known.start) == ((10,), 5)
    assert (speculative.token_ids, speculative.start, speculative.num_tokens) == ((), 6, 1)
    assert speculative.slot == known.slot
    assert speculative.sample is not None
    assert speculative.sample.output_index == 2
    assert rig.plan() == (), "no more than `chain` plans of one request"
    rig.resolve()
    (third,) = rig.plan()
    assert (third.token_ids, third.start) == ((), 7)
    rig.run()
    assert rig.outputs(1) == [10 + index for index in range(8)]


@pytest.mark.parametrize("chain", [1, 2, 3])
def test_chain_bounds_the_rows_in_flight(chain: int) -> None:
    rig = decoding(20, chain=chain)
    assert [len(rig.plan()) for _ in range(chain + 1)] == [1] * chain + [0]
    assert rig.request(1).rows_in_flight == chain


def test_no_row_past_max_tokens() -> None:
    rig = decoding(2)
    assert [len(rig.plan()), len(rig.plan())] == [1, 0]
    rig.resolve()
    assert rig.ended(1).reason is EndReason.LENGTH
    assert rig.scheduler.load(0.0).discarded_rows == 0


def test_no_row_past_the_context() -> None:
    rig = decoding(50, 6, rig=Rig(chain=2, max_context_tokens=8))
    assert [len(rig.plan()), len(rig.plan())] == [1, 0]
    rig.run()
    assert rig.outputs(1) == [10, 11]


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.5}]
)
def test_no_row_where_the_draw_needs_the_tokens_before_it(penalty: dict[str, Any]) -> None:
    rig = decoding(4, **penalty)
    for index in range(1, 4):
        (row,) = rig.plan()
        assert rig.plan() == ()
        assert row.sample is not None
        assert row.sample.history == (*range(100, 105), *range(10, 10 + index))
        assert row.sample.num_prompt == 5
        rig.resolve()
    assert rig.outputs(1) == [10, 11, 12, 13]


def test_history_travels_only_where_it_is_needed() -> None:
    rig = decoding()
    (row,) = rig.plan()
    assert row.sample is not None
    assert row.sample.history == ()


def test_a_row_after_the_end_is_discarded() -> None:
    rig = Rig(chain=2)
    rig.script[1] = [7, EOS]
    decoding(rig=rig)
    rig.plan()
    rig.plan()
    rig.resolve()
    assert rig.ended(1).reason is EndReason.STOP
    pool = rig.scheduler.kv.pool
    assert pool.counts().quarantined + pool.counts().cached == 2, "the second launch may still write"
    assert pool.num_free == 30
    assert rig.resolve() == []
    assert rig.scheduler.load(0.0).discarded_rows == 1
    assert rig.outputs(1) == [7, EOS]
    assert rig.num_free == 32


def test_min_tokens_counts_what_is_in_flight() -> None:
    rig = decoding(8, min_tokens=3)
    banned = [row.sample.banned for rows in (rig.plan(), rig.plan()) for row in rows if row.sample is not None]
    assert banned == [(EOS,), (EOS,)]
    rig.resolve()
    (row,) = rig.plan()
    assert row.sample is not None
    assert (row.sample.output_index, row.sample.banned) == (3, ())


# ---- at whose cost ------------------------------------------------------------------------------------------------


def full_pool() -> Rig:
    """Requests 1 and 2 decode in two pages each, all that there are; both are at the end of their second page."""
    rig = Rig(chain=2, num_pages=4)
    for number in (1, 2):
        rig.submit(number, 7, 6)
    rig.step()
    assert [row.start for row in rig.plan()] == [7, 7]
    return rig


def test_a_speculative_row_retracts_nobody() -> None:
    rig = full_pool()
    assert rig.plan() == (), "each would need a page, for a token that is not known"
    assert not any(rig.request(number).retracting for number in (1, 2))
    rig.resolve()
    assert [row.request_id for row in rig.plan()] == [1], "now it is known, and the youngest gives way"
    assert rig.scheduler.load(0.0).retractions == 1
    rig.run()
    for number in (1, 2):
        assert rig.outputs(number) == [10 + index for index in range(6)]


def test_a_request_chosen_for_retraction_gets_no_more_rows_and_goes_when_its_launches_resolve() -> None:
    rig = Rig(chain=2, num_pages=5)
    rig.submit(1, 7, 9)
    rig.submit(2, 6, 9)
    rig.step()  # four pages, one is free
    rig.plan()  # 1 at 7, 2 at 6
    rows = rig.plan()  # 1 speculates into the fifth page, 2 at 7
    assert [(row.request_id, row.start, len(row.pages)) for row in rows] == [(1, 8, 3), (2, 7, 2)]
    while not rig.request(2).retracting:
        rig.resolve()
        rows = rig.plan()
        assert {row.request_id for row in rows} <= {1, 2}
        if rig.request(2).state is State.WAITING:
            break
    while rig.request(2).retracting:
        assert all(row.request_id == 1 for row in rig.plan())
        rig.resolve()
    assert rig.request(2).state is State.WAITING
    assert rig.request(2).rows_in_flight == 0
    rig.run()
    for number in (1, 2):
        assert rig.outputs(number) == [10 + index for index in range(9)]


def test_known_tokens_get_the_last_page_before_speculative_ones() -> None:
    """The older one's token is in flight and the younger one's is known: nobody is retracted for a guess."""
    rig = Rig(chain=2, num_pages=5)
    rig.submit(1, 6, 6)
    rig.step()
    rig.submit(2, 8, 2)
    assert [(row.request_id, row.start) for row in rig.plan()] == [(1, 6), (2, 0)]
    assert [(row.request_id, row.start) for row in rig.plan()] == [(1, 7)]
    rig.resolve()
    assert [(row.request_id, row.start) for row in rig.plan()] == [(2, 8)], "both want the fifth page"
    rig.run()
    assert rig.outputs(1) == [10 + index for index in range(6)]
    assert rig.outputs(2) == [10, 11]
    assert rig.scheduler.load(0.0).retractions == 0


def test_nobody_is_retracted_while_cached_pages_are_on_their_way_back() -> None:
    rig = Rig(chain=2, num_pages=5)
    rig.submit(1, 8, 4)
    rig.submit(2, 8, 1)
    rig.plan()
    rig.submit(3, 3, 1)
    rig.plan()
    rig.resolve()
    assert rig.ended(2).reason is EndReason.LENGTH
    assert rig.scheduler.kv.pool.num_cached == 2, "not to be evicted before the second launch has resolved"
    assert rig.plan() == ()
    assert rig.request(1).state is State.DECODING
    rig.resolve()
    assert [row.request_id for row in rig.plan()] == [1]
    assert rig.scheduler.load(0.0).retractions == 0


def test_a_retracted_request_recomputes_over_its_cached_prefix() -> None:
    rig = full_pool()
    rig.resolve()
    rig.plan()
    assert rig.request(2).state is State.WAITING
    known = len(rig.request(2).tokens)
    starts: dict[int, int] = {}
    while rig.in_flight or rig.plan():
        for row in rig.in_flight[0].rows:
            if row.request_id == 2:
                starts.setdefault(row.start, row.num_tokens)
        rig.resolve()
    first = min(starts)
    assert first in (0, 4)
    assert starts[first] == known - first, "prompt and output, as one extend"

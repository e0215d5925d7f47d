"""What a plan is made of: whose rows come first, how much of a prompt, whose pages, and who must give way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import SchedulerConfig
from tandem.core.messages.plans import Row
from tandem.core.messages.requests import Cancel, EndReason
from tandem.core.states import State
from tests.core.export_rig import ExportRig
from tests.core.rig import Rig, prompt_of


def budget(tokens: int, **values: Any) -> SchedulerConfig:
    return SchedulerConfig(budget_tokens=tokens, step_seconds_max=0.0, **values)


def shape(rows: tuple[Row, ...]) -> list[tuple[int, int, int, bool]]:
    return [(row.request_id, row.start, row.num_tokens, row.sample is not None) for row in rows]


# ---- chunks -------------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 60), tokens=st.integers(1, 70))
@settings(max_examples=40)
def test_a_prompt_is_cut_by_the_budget(length: int, tokens: int) -> None:
    rig = Rig(scheduler=budget(tokens))
    prompt = prompt_of(length)
    rig.submit(1, prompt, 1)
    seen: list[int] = []
    while rows := rig.plan():
        (row,) = rows
        assert row.start == len(seen)
        assert row.num_tokens == min(tokens, length - len(seen))
        seen += row.token_ids
        assert (row.sample is not None) == (len(seen) == length)
        rig.resolve()
    assert seen == prompt
    assert rig.ended(1).reason is EndReason.LENGTH


def test_chunks_of_one_prompt_chain_and_the_rest_goes_to_the_next_prompt() -> None:
    rig = Rig(scheduler=budget(8))
    rig.submit(1, 12)
    rig.submit(2, 6)
    rig.submit(3, 6)
    assert shape(rig.plan()) == [(1, 0, 8, False)]
    assert shape(rig.plan()) == [(1, 8, 4, True), (2, 0, 4, False)], "the tokens are known: no need to wait"
    assert shape(rig.plan()) == [(2, 4, 2, True), (3, 0, 6, True)]
    assert rig.plan() == ()


def test_decode_rows_come_first_and_prompts_always_progress() -> None:
    rig = Rig(scheduler=budget(3))
    for number in (1, 2, 3, 4):
        rig.submit(number, 3, 40)
        while rig.request(number).state is not State.DECODING:
            rig.step()
    rig.submit(5, 9, 20)
    rows = shape(rig.plan())
    assert [number for number, _, _, _ in rows] == [1, 2, 3, 4, 5]
    assert rows[4] == (5, 0, 1, False)


def test_slots_bound_what_runs() -> None:
    rig = Rig(scheduler=budget(100, max_running_requests=2))
    for number in (1, 2, 3):
        rig.submit(number, 3, 2)
    assert [row.request_id for row in rig.plan()] == [1, 2]
    assert {row.slot for row in rig.in_flight[0].rows} == {0, 1}
    rig.run()
    assert rig.outputs(3) == [10, 11]


def test_a_finished_chunk_is_shareable_at_once() -> None:
    rig = Rig(scheduler=budget(8))
    prompt = prompt_of(20)
    rig.submit(1, prompt, 1)
    rig.step()
    rig.submit(2, prompt, 1)
    assert shape(rig.plan()) == [(1, 8, 8, False)]
    first, second = rig.plan()
    assert shape((first, second)) == [(1, 16, 4, True), (2, 8, 4, False)]
    assert second.pages[:2] == first.pages[:2]
    assert set(second.pages[2:]).isdisjoint(first.pages)


def test_a_prefix_is_shared_but_the_last_token_is_computed() -> None:
    rig = Rig()
    prompt = prompt_of(8)
    for number in (1, 2):
        rig.submit(number, prompt, 1)
        rig.run()
    assert rig.ended(2).cached_tokens == 4
    load = rig.scheduler.load(0.0)
    assert (load.prefix_hit_tokens, load.prefix_query_tokens) == (4, 16)


# ---- reservation --------------------------------------------------------------------------------------------------


def test_a_prompt_starts_only_with_all_of_its_pages() -> None:
    rig = Rig(num_pages=8, scheduler=budget(4))
    rig.submit(1, 20, 1)
    rig.submit(2, 16, 1)
    assert shape(rig.plan()) == [(1, 0, 4, False)]
    assert rig.scheduler.kv.pool.num_free == 3, "five pages are reserved for the whole prompt"
    assert rig.request(2).state is State.WAITING
    assert rig.request(2).pages == []
    rig.run()
    assert rig.ended(2).reason is EndReason.LENGTH


def test_a_newcomer_leaves_a_page_for_each_that_decodes() -> None:
    rig = Rig(num_pages=8)
    rig.submit(1, 4, 9)
    rig.step()
    rig.submit(2, 24, 1)
    assert [row.request_id for row in rig.plan()] == [1], "6 pages for the prompt, 1 held, and 1 for the next token"
    rig.resolve()
    rig.send(Cancel(1))
    assert [row.request_id for row in rig.plan()] == [2]


def test_a_request_that_cannot_start_leaves_the_cache_as_it_is() -> None:
    """Otherwise its own prefix would look used, and others' would be evicted, at every plan."""
    rig = Rig(num_pages=8)
    rig.submit(1, prompt_of(9), 1)
    rig.run()
    rig.submit(2, 18, 10)
    rig.step()
    before = {node.page: (node.used, node.fence) for node in rig.scheduler.kv.tree.nodes()}
    assert len(before) == 6
    rig.submit(3, [*prompt_of(8), *range(20)], 1)
    rig.plan()
    assert {node.page: (node.used, node.fence) for node in rig.scheduler.kv.tree.nodes()} == before
    assert rig.request(3).state is State.WAITING
    rig.run()
    assert rig.ended(3).reason is EndReason.LENGTH


# ---- retraction ---------------------------------------------------------------------------------------------------


def crowd(num_pages: int = 6, **changes: Any) -> Rig:
    """Three requests that decode, of two pages each; the pool is full, and all need a third page at once."""
    rig = Rig(num_pages=num_pages, **changes)
    for number in (1, 2, 3):
        rig.submit(number, 5, 12)
    rig.step()
    return rig


def test_the_youngest_is_retracted_and_resumes() -> None:
    rig = crowd()
    while not rig.scheduler.load(0.0).retractions:
        assert {row.request_id for row in rig.plan()} <= {1, 2, 3}
        rig.resolve()
    assert rig.request(3).state is State.WAITING
    known = list(rig.request(3).tokens)
    assert rig.request(1).state is rig.request(2).state is State.DECODING
    rig.submit(4, 4, 1)
    rig.run()
    for number in (1, 2, 3):
        assert rig.outputs(number) == [10 + index for index in range(12)]
        assert rig.ended(number).reason is EndReason.LENGTH
    assert rig.outputs(3)[: len(known) - 5] == known[5:]
    assert rig.num_free == 6


def test_the_retracted_wait_in_front_of_those_that_came_earlier() -> None:
    rig = Rig()
    ledger = rig.scheduler._ledger
    for number in (1, 2, 3, 4):
        rig.submit(number, 4)
    for number in (4, 3):
        request = rig.request(number)
        ledger.waiting.remove(request)
        request.was_retracted = True
        ledger.wait(request)
    assert [request.request_id for request in ledger.waiting] == [3, 4, 1, 2]


def test_the_retracted_goes_before_newcomers() -> None:
    rig = crowd()
    rig.submit(4, 4, 1)
    while not rig.scheduler.load(0.0).retractions:
        rig.plan()
        rig.resolve()
    assert [request.request_id for request in rig.scheduler._ledger.waiting] == [3, 4]
    order: list[int] = []
    while rows := rig.plan():
        order += [row.request_id for row in rows if row.request_id in (3, 4)]
        rig.resolve()
    assert order.index(3) < order.index(4)


def test_a_victim_is_never_older_than_who_needs_the_page() -> None:
    rig = Rig(num_pages=4)
    rig.submit(1, 8, 5)
    rig.step()
    rig.submit(2, 4, 5)
    rig.step()
    while rig.request(2).state is State.DECODING:
        rig.step()
    assert rig.request(1).state is State.DECODING
    rig.run()
    assert rig.outputs(1) == rig.outputs(2) == [10, 11, 12, 13, 14]


def test_one_alone_is_never_retracted_for_itself() -> None:
    rig = Rig(num_pages=4)
    rig.submit(1, 5, 12)
    rig.run()
    assert rig.ended(1).reason is EndReason.LENGTH
    assert rig.scheduler.load(0.0).retractions == 0


@pytest.mark.parametrize("chain", [1, 2])
@given(data=st.data())
@settings(max_examples=40)
def test_any_crowd_gets_all_of_its_tokens(chain: int, data: st.DataObject) -> None:
    """Random requests over a small pool, with plans in flight as deep as the loop allows."""
    rig = Rig(num_pages=8, chain=chain, scheduler=budget(data.draw(st.integers(1, 20)), max_running_requests=3))
    wanted: dict[int, int] = {}
    for number in range(1, 7):
        length = data.draw(st.integers(1, 20))
        wanted[number] = data.draw(st.integers(1, 32 - length))
        rig.submit(number, prompt_of(length, data.draw(st.sampled_from([100, 100 * number]))), wanted[number])
    for _ in range(2000):
        if len(rig.in_flight) < chain and data.draw(st.booleans()) and rig.plan():
            continue
        if rig.in_flight:
            rig.resolve()
        elif not rig.plan():
            break
    assert rig.scheduler.idle
    assert {number: len(rig.outputs(number)) for number in wanted} == wanted
    assert rig.num_free == 8


# ---- leased hand-offs in the way ----------------------------------------------------------------------------------


def test_a_hand_off_that_goes_while_its_row_is_planned_has_no_row() -> None:
    """Otherwise its row would write into pages that the same plan gives to somebody else."""
    rig = ExportRig(ready=False, num_pages=8, scheduler=budget(8))
    rig.open(1, 1, 20)
    rig.step()
    rig.lose(1)
    rig.step()
    assert rig.export(1).request.num_computed == 16
    rig.open(2, 2, 24, importer=b"other")
    rows = rig.plan()
    assert not rig.is_live(1)
    assert shape(rows) == [(rig.export(2).request.request_id, 0, 4, False)]

"""Devices as the loop sees them: order, signals, failures, the end."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable

import pytest

from tandem.core.messages.plans import Plan, PlanResolved, Row, Sample
from tandem.core.messages.sampling import SamplingParams
from tandem.engine.compute_thread import ComputeThread
from tandem.engine.cuda import _published_pages
from tandem.engine.device import MAX_UNRESOLVED, DeviceFailed, GradientWork
from tests.engine.driver import WAIT_SECONDS


def plan(number: int) -> Plan:
    return Plan(number, ())


def readable(thread: ComputeThread, seconds: float) -> bool:
    return bool(select.select([thread], [], [], seconds)[0])


def take(thread: ComputeThread, count: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < count:
        assert readable(thread, WAIT_SECONDS)
        taken += [resolved.plan_id for resolved in thread.resolved()]
    return taken


def echo(thread: ComputeThread, act: Callable[[Plan], object] = lambda _: None) -> None:
    while (work := thread.take(block=True)) is not None:
        if isinstance(work, Plan):
            act(work)
            thread.give(PlanResolved(work.plan_id, ()))
        elif not isinstance(work, GradientWork):
            work()


def test_results_come_in_order_and_are_signalled_once() -> None:
    gate = threading.Semaphore(0)
    thread = ComputeThread(lambda t: echo(t, lambda _: gate.acquire(timeout=WAIT_SECONDS)))
    for number in range(3):
        thread.launch(plan(number))
    assert thread.unresolved == 3
    assert not readable(thread, 0)
    assert thread.resolved() == []
    gate.release()
    assert take(thread, 1) == [0]
    assert thread.unresolved == 2
    gate.release(2)
    assert take(thread, 2) == [1, 2]
    assert thread.unresolved == 0
    while readable(thread, 0.01):  # a signal that came after its result was taken
        assert thread.resolved() == []
    thread.close()
    thread.close()


def test_a_failure_comes_after_the_results_before_it_and_stays() -> None:
    def fail_at_two(work: Plan) -> None:
        if work.plan_id == 2:
            raise ValueError("out of luck")

    thread = ComputeThread(lambda t: echo(t, fail_at_two))
    for number in range(4):
        thread.launch(plan(number))
    assert take(thread, 2) == [0, 1]
    for _ in range(2):
        assert readable(thread, WAIT_SECONDS)
        with pytest.raises(DeviceFailed, match="plan 2 failed on the device: ValueError: out of luck") as caught:
            thread.resolved()
        assert caught.value.plan_id == 2
        assert isinstance(caught.value.__cause__, ValueError)
    assert thread.unresolved == 2
    thread.close()


def test_results_before_a_failure_are_not_lost_when_taken_together() -> None:
    def fail_at_one(work: Plan) -> None:
        if work.plan_id == 1:
            raise ValueError("out of luck")

    thread = ComputeThread(lambda t: echo(t, fail_at_one))
    thread.launch(plan(0))
    thread.launch(plan(1))
    thread._thread.join(WAIT_SECONDS)  # both outcomes are there
    assert [resolved.plan_id for resolved in thread.resolved()] == [0]
    assert readable(thread, 0)
    with pytest.raises(DeviceFailed):
        thread.resolved()
    thread.close()


def test_close_drops_what_has_not_begun() -> None:
    begun, gate = threading.Event(), threading.Event()
    executed: list[int] = []

    def act(work: Plan) -> None:
        executed.append(work.plan_id)
        begun.set()
        gate.wait(WAIT_SECONDS)

    thread = ComputeThread(lambda t: echo(t, act))
    for number in range(3):
        thread.launch(plan(number))
    assert begun.wait(WAIT_SECONDS)
    opener = threading.Thread(target=open_when_stopping, args=(thread, gate), daemon=True)
    opener.start()
    thread.close()
    opener.join()
    assert executed == [0]


def open_when_stopping(thread: ComputeThread, gate: threading.Event) -> None:
    while not thread._stopping:
        time.sleep(0.001)
    gate.set()


def test_posted_work_stands_between_plans() -> None:
    order: list[object] = []
    thread = ComputeThread(lambda t: echo(t, lambda work: order.append(work.plan_id)))
    thread.launch(plan(0))
    thread.post(lambda: order.append("between"))
    thread.launch(plan(1))
    assert take(thread, 2) == [0, 1]
    assert order == [0, "between", 1]
    thread.close()


def test_launches_are_bounded() -> None:
    thread = ComputeThread(echo)
    for number in range(MAX_UNRESOLVED):
        thread.launch(plan(number))
    with pytest.raises(AssertionError, match="launches without taking results"):
        thread.launch(plan(MAX_UNRESOLVED))
    thread.close()


def test_pages_that_a_gpu_publishes() -> None:
    """Those of prompt chunks, whole or partial; not those of decode rows."""

    def row(start: int, num_tokens: int, *, sampled: bool, zero_tail: bool = False) -> Row:
        sample = Sample(params=SamplingParams(), output_index=0) if sampled else None
        return Row(
            request_id=0,
            slot=0,
            start=start,
            num_tokens=num_tokens,
            token_ids=(1,) * num_tokens,
            pages=(10, 11, 12, 13),
            sample=sample,
            zero_tail=zero_tail,
        )

    assert _published_pages(row(0, 8, sampled=False), 8) == (10,)
    assert _published_pages(row(4, 9, sampled=False), 8) == (10, 11)
    assert _published_pages(row(8, 1, sampled=False), 8) == (11,)
    assert _published_pages(row(20, 5, sampled=True), 8) == (12, 13)
    assert _published_pages(row(20, 1, sampled=True, zero_tail=True), 8) == (12,)
    assert _published_pages(row(20, 1, sampled=True), 8) == ()

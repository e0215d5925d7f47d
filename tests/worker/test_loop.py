"""The event loop with real ports and the real scheduler: what comes out, that it blocks, and how it ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tandem.core.messages.plans import Plan
from tandem.core.messages.requests import Cancel, Drain, Ended, EndReason, Tokens
from tandem.core.messages.worker import Stats
from tandem.core.roles import Pacing
from tandem.engine.device import DeviceFailed
from tandem.ipc import ChannelClosed
from tandem.worker.chores import STATS_SECONDS
from tandem.worker.loop import run
from tandem.worker.messages import StepEnded
from tests.fakes.device import CountingDevice
from tests.worker.rank_bench import VOCAB_SIZE, RankBench, running_rank

LOOPS: tuple[Pacing, ...] = ("normal", "overlap")


@contextmanager
def computing_rank(**options: Any) -> Iterator[tuple[RankBench, threading.Event]]:
    """A rank whose device computes for request 1, and does not get done before the event is set."""
    began, go_on = threading.Event(), threading.Event()

    def stand_still(plan: Plan) -> None:
        began.set()
        go_on.wait()

    with running_rank(device=CountingDevice(VOCAB_SIZE, before=stand_still)) as rank:
        try:
            rank.submit(1, [1], max_tokens=100, **options)
            assert began.wait(10.0)
            yield rank, go_on
        finally:
            go_on.set()


@pytest.mark.parametrize("loop", LOOPS)
def test_requests_get_their_tokens_in_order(loop: Pacing) -> None:
    with running_rank(loop=loop) as rank:
        for request_id in range(1, 9):
            rank.submit(request_id, [request_id * 100], max_tokens=10)
        rank.read_until(lambda: len(rank.of(Ended)) == 8)
        for request_id in range(1, 9):
            assert rank.output(request_id) == [request_id * 100 + 1 + index for index in range(10)]
            assert [ended.reason for ended in rank.ended(request_id)] == [EndReason.LENGTH]


@pytest.mark.parametrize(("loop", "most"), [("normal", 1), ("overlap", 2)])
def test_as_many_plans_are_launched_as_the_loop_allows(loop: Pacing, most: int) -> None:
    seen: list[int] = []
    device = CountingDevice(VOCAB_SIZE, seconds=0.002)
    launch = device.launch

    def counted(plan: Plan) -> None:
        launch(plan)
        seen.append(device.unresolved)

    device.launch = counted  # type: ignore[method-assign]
    with running_rank(loop=loop, device=device) as rank:
        rank.submit(1, [1], max_tokens=20)
        rank.read_until(lambda: bool(rank.of(Ended)))
    assert max(seen) == most


def test_every_turn_that_says_something_is_marked_as_a_step() -> None:
    with running_rank() as rank:
        rank.submit(1, [1], max_tokens=5)
        rank.read_until(lambda: bool(rank.of(Ended)) and isinstance(rank.received[-1], StepEnded | Stats))
        messages = [message for message in rank.received if isinstance(message, Tokens | Ended | StepEnded)]
        assert isinstance(messages[-1], StepEnded)
        steps = [message.step for message in messages if isinstance(message, StepEnded)]
        assert steps == list(range(1, len(steps) + 1))
        assert not any(
            isinstance(first, StepEnded) and isinstance(second, StepEnded)
            for first, second in itertools.pairwise(messages)
        )


def test_an_idle_loop_blocks() -> None:
    with running_rank() as rank:
        rank.submit(1, [1], max_tokens=3)
        rank.read_until(lambda: bool(rank.of(Ended)))
        deadline = time.monotonic() + 20.0
        while True:  # it has its last figures and its self-check to do
            before = rank.num_turns
            time.sleep(0.5)
            if rank.num_turns == before:
                break
            assert time.monotonic() < deadline, "it never blocks"


def test_figures_come_when_something_changes_and_not_too_often() -> None:
    with running_rank(device=CountingDevice(VOCAB_SIZE, seconds=0.005)) as rank:
        began = time.monotonic()
        rank.submit(1, [1], max_tokens=100)
        rank.read_until(lambda: bool(rank.of(Ended)))
        most = (time.monotonic() - began) / STATS_SECONDS + 2
        assert 2 <= len(rank.of(Stats)) <= most
        rank.read_until(lambda: rank.of(Stats)[-1].load.running_requests == 0)
        load = rank.of(Stats)[-1].load
        assert load.generated_tokens == 100
        assert load.pages.held == 0


def test_a_cancel_is_heard_while_the_device_computes() -> None:
    with computing_rank() as (rank, _):
        rank.send(Cancel(1))
        rank.read_until(lambda: bool(rank.of(Ended)))
        assert rank.ended(1)[0].reason is EndReason.CANCELLED


def test_a_frontend_that_reads_late_gets_everything_and_stalls_nobody() -> None:
    with running_rank() as rank:
        for request_id in range(1, 33):
            rank.submit(request_id, [request_id], max_tokens=100)
        deadline = time.monotonic() + 20.0
        while rank.scheduler.load(0.0).generated_tokens < 3200:  # nobody reads, and yet it goes on
            assert time.monotonic() < deadline
            time.sleep(0.01)
        rank.read_until(lambda: len(rank.of(Ended)) == 32)
        assert all(len(rank.output(request_id)) == 100 for request_id in range(1, 33))


def test_a_drain_lets_requests_end_and_then_the_loop() -> None:
    with computing_rank() as (rank, go_on):
        rank.send(Drain(None))
        rank.submit(2, [2], max_tokens=20)
        rank.read_until(lambda: bool(rank.of(Ended)))
        go_on.set()
        rank.read_until(lambda: len(rank.of(Ended)) == 2)
        assert rank.ended(1)[0].reason is EndReason.LENGTH
        assert rank.ended(2)[0].reason is EndReason.DRAINED
        rank.join()
        assert rank.error is None


def test_a_drain_has_a_bound() -> None:
    with running_rank(device=CountingDevice(VOCAB_SIZE, seconds=0.3)) as rank:
        rank.submit(1, [1], max_tokens=100)
        rank.read_until(lambda: bool(rank.of(Tokens)))
        rank.send(Drain(0.2))
        rank.read_until(lambda: bool(rank.of(Ended)))  # without a bound it takes 30 s
        assert rank.ended(1)[0].reason is EndReason.DRAINED
        rank.join()


def test_a_deadline_is_kept_though_nothing_else_happens() -> None:
    with computing_rank(timeout_seconds=0.2) as (rank, _):
        rank.read_until(lambda: bool(rank.of(Ended)))
        assert rank.ended(1)[0].reason is EndReason.DEADLINE


def test_a_timer_alone_brings_figures() -> None:
    """A lease that ends says nothing to anybody; the figures must follow all the same."""
    turns: list[bool] = []

    class Once:
        """A scheduler with one timer, due at 1.0, that says nothing; finished after it."""

        def finished(self) -> bool:
            return len(turns) == 2

        def next_timer(self) -> float | None:
            return 1.0 if not turns else None

        def handle(self, event: object, now: float) -> None: ...

        def plan(self, now: float) -> None: ...

        def drain_effects(self) -> list[object]:
            return []

    class Recorder:
        """Chores that want to be called again, once."""

        def next_due(self) -> float | None:
            return None

        def run(self, scheduler: object, *, happened: bool, idle: bool, now: float) -> None:
            turns.append(happened)

    class Silent:
        """Ports where nothing arrives."""

        def wait(self, until: float | None) -> list[object]:
            return []

        def flush(self, effects: list[object]) -> None: ...

    device = CountingDevice(VOCAB_SIZE)
    run(Once(), device, Silent(), lambda: 1.0, 0, Recorder())  # type: ignore[arg-type]
    device.close()
    assert turns == [True, False]


def test_the_loop_ends_with_its_frontend() -> None:
    with running_rank() as rank:
        rank.submit(1, [1], max_tokens=100)
        rank.channel.close()
        rank.join()
        assert isinstance(rank.error, ChannelClosed)


def test_a_device_that_fails_ends_the_loop_with_the_reason() -> None:
    def fail(plan: Plan) -> None:
        raise RuntimeError("no more memory")

    with running_rank(device=CountingDevice(VOCAB_SIZE, before=fail)) as rank:
        rank.submit(1, [1], max_tokens=100)
        rank.join()
        assert isinstance(rank.error, DeviceFailed) and "no more memory" in str(rank.error)

"""The bounds on resumption: how often, within which budget, for how long; each says so and counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.core.messages.requests import Ended, EndReason
from tandem.errors import Draining, NoWorker, Overloaded, PeerLost
from tandem.gateway import generation, resumption
from tests.fakes.worker import FakeWorker
from tests.gateway.harness import Setup, collect, failure, run, text_request, until
from tests.gateway.resumption_rig import by_each_way, count, kill, serving, stalling


def test_an_answer_is_resumed_so_often_and_no_more(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        for step in range(3):
            worker = await serving(setup)
            for other in setup.workers:
                other.stall_after = 5 + step if other is not worker else 0  # which says no more
            await kill(worker)
        code, error = await failure(call)
        assert code is grpc.StatusCode.ABORTED
        assert isinstance(error, PeerLost)
        assert count(setup, "resumptions", cause="worker_lost") == 2
        assert count(setup, "resumptions_refused", reason="limit") == 1

    run(tmp_path, scenario, *(stalling(4, "x") for _ in range(4)), max_resumptions=2)


def test_nothing_is_resumed_where_that_is_off(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        await kill(await serving(setup))
        code, error = await failure(call)
        assert code is grpc.StatusCode.UNAVAILABLE, "the client has seen nothing"
        assert isinstance(error, PeerLost)
        assert error.retry_after_seconds is not None

    run(tmp_path, scenario, stalling(0, "x"), stalling(0, "x"), max_resumptions=0)


def test_the_budget_is_over_all_requests(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        calls = [setup.stub.StreamGenerate(text_request("ab", max_tokens=20)) for _ in range(6)]
        await until(lambda: sum(worker.inflight for worker in setup.workers) == 6)
        await until(lambda: count(setup, "tokens", kind="output") == 6 * 4)
        first, other = setup.workers
        assert first.inflight == 3
        other.stall_after = None
        await kill(first)
        outcomes = await asyncio.gather(*(collect(call) for call in calls), return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert [error.code() for error in errors] == [grpc.StatusCode.ABORTED] * 2
        assert count(setup, "resumptions", cause="worker_lost") == 1
        assert count(setup, "resumptions_refused", reason="budget") == 2

    run(tmp_path, scenario, stalling(4, "x"), stalling(4, "x"), resumption_burst=1, resumptions_per_second=0.01)


@by_each_way
def test_no_other_worker_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[FakeWorker], Any]
) -> None:
    monkeypatch.setattr(resumption, "WORKER_WAIT_SECONDS", 0.3)

    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        worker = await serving(setup)
        began = time.monotonic()
        await end(worker)
        code, error = await failure(call)
        assert 0.25 < time.monotonic() - began < 10, "an answer waits for 15 s by itself"
        assert code is grpc.StatusCode.ABORTED
        assert isinstance(error, PeerLost if end is kill else Draining)
        assert count(setup, "resumptions_refused", reason="no_worker") == 1
        assert not setup.gateway._dispatcher._watchers
        code, error = await failure(setup.stub.Generate(text_request("ab")))
        assert code is grpc.StatusCode.UNAVAILABLE, "a new request is told at once"
        assert isinstance(error, NoWorker)

    run(tmp_path, scenario, stalling(4, "x"))


def test_the_deadline_bounds_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin of seconds: the client's own clock must not be the first to say that time is up."""
    monkeypatch.setattr(generation, "MARGIN_SECONDS", 4.0)
    monkeypatch.setattr(generation, "MARGIN_SHARE", 0.9)

    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20), timeout=5.0)
        worker = await serving(setup)
        await kill(worker)
        code, error = await failure(call)
        assert code is grpc.StatusCode.ABORTED
        assert isinstance(error, PeerLost)
        assert count(setup, "resumptions_refused", reason="deadline") == 1

    run(tmp_path, scenario, stalling(4, "x"))


def test_a_cancelled_wait_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        await kill(await serving(setup))
        await until(lambda: len(setup.gateway._dispatcher._watchers) == 1)
        call.cancel()
        await until(lambda: setup.gateway.admission.inflight == 0)
        assert not setup.gateway._dispatcher._watchers

    run(tmp_path, scenario, stalling(4, "x"))


def test_a_new_request_that_everybody_refuses_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("SAME_WORKER_SECONDS", "WORKER_WAIT_SECONDS"):
        monkeypatch.setattr(resumption, bound, 40.0)

    async def scenario(setup: Setup) -> None:
        for worker in setup.workers:
            worker.refusal = Ended(request_id=0, reason=EndReason.REJECTED, message="full", overloaded=True)
        began = time.monotonic()
        code, error = await failure(setup.stub.Generate(text_request("ab")))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error, Overloaded)
        assert time.monotonic() - began < 20, "it has waited for a worker"
        assert [len(worker.submits) for worker in setup.workers] == [1, 1]

    run(tmp_path, scenario, stalling(None, "x"), stalling(None, "x"))

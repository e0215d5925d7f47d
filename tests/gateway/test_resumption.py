"""An answer whose worker goes away goes on at another one, each token once and in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.core.messages.requests import Ended, EndReason
from tandem.core.token_ids import unpack
from tandem.gateway import resumption
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.fakes.worker import FakeWorker, scripted
from tests.gateway.harness import Setup, byte_worker, collect, run, text_request, until
from tests.gateway.model import ids_of
from tests.gateway.resumption_rig import CAUSE, TEXT, by_each_way, count, drain, kill, said, serving, stalling

# ---- what the client gets -------------------------------------------------------------------------------------------


@by_each_way
@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_a_stream_goes_on_where_it_was(tmp_path: Path, cut: int, end: Callable[[FakeWorker], Any]) -> None:
    request = text_request(
        "ab",
        max_tokens=60,
        sampling=pb.SamplingParams(temperature=0.7),
        output=pb.OutputOptions(return_token_ids=True, logprobs=2, prompt_logprobs=0, stream_interval=1),
    )

    async def scenario(setup: Setup) -> None:
        undisturbed = "".join(message.text for message in await collect(setup.stub.StreamGenerate(request)))
        for worker in setup.workers:
            worker.stall_after = cut
            worker.submits.clear()
        call = setup.stub.StreamGenerate(request, timeout=20)
        first = await serving(setup)
        other = next(worker for worker in setup.workers if worker is not first)
        other.stall_after = None
        other.cached_tokens = 100  # a cache may know the answer's own output, too
        await end(first)
        messages = await collect(call)
        assert "".join(message.text for message in messages) == undisturbed
        assert [token for message in messages for token in message.token_ids] == said(60)
        assert sum(len(message.logprobs) for message in messages) == 60
        assert len([message for message in messages if message.prompt_logprobs]) == 1
        assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert (messages[-1].usage.prompt_tokens, messages[-1].usage.completion_tokens) == (2, 60)
        assert messages[-1].usage.cached_tokens == (1 if end is drain else 2)
        (before,), (after,) = first.submits, other.submits
        assert unpack(after.output_token_ids) == said(cut)
        assert after.sampling == before.sampling, "the minted seed above all"
        assert after.sampling.seed
        assert 0 < after.timeout.ToMicroseconds() < before.timeout.ToMicroseconds()
        assert count(setup, "resumptions", cause=CAUSE[end]) == 1
        parts = 2 if end is drain else 1  # one that was killed has not said what it took
        assert messages[-1].timing.prefill.ToMilliseconds() == 250 * parts

    run(tmp_path, scenario, stalling(None), stalling(None))


@by_each_way
def test_a_unary_call_with_several_answers_goes_on(tmp_path: Path, end: Callable[[FakeWorker], Any]) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.Generate(
            text_request("ab", max_tokens=30, sampling=pb.SamplingParams(n=3, temperature=1.0, seed=7))
        )
        await until(lambda: count(setup, "tokens", kind="output") == 3 * 4)
        first, other = sorted(setup.workers, key=lambda worker: -worker.inflight)
        moved = first.inflight
        other.stall_after = None
        await end(first)
        answer = await call
        expected = bytes(ids_to_bytes(said(30))).decode(errors="replace")
        assert [choice.text for choice in answer.choices] == [expected] * 3
        assert answer.usage.completion_tokens == 90
        assert sorted({submit.sampling.seed for submit in other.submits}) == [7, 8, 9]
        assert count(setup, "resumptions", cause=CAUSE[end]) == moved

    run(tmp_path, scenario, stalling(4), stalling(4))


def ids_to_bytes(ids: list[int]) -> list[int]:
    table = {token: byte for byte, token in zip(TEXT.encode(), ids_of(TEXT), strict=True)}
    return [table[token] for token in ids]


@by_each_way
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_the_cut(tmp_path: Path, include: bool, end: Callable[[FakeWorker], Any]) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request(
            "ab", max_tokens=60, stop=pb.StopConditions(stop=["and so"], include_stop_in_output=include)
        )
        call = setup.stub.StreamGenerate(request)
        first = await serving(setup)
        for worker in setup.workers:
            worker.stall_after = None if worker is not first else 17
        await end(first)
        messages = await collect(call)
        assert "".join(message.text for message in messages) == "aé€😀ü, " + ("and so" if include else "")
        assert messages[-1].stop_string == "and so"
        assert messages[-1].usage.completion_tokens == len("aé€😀ü, and so".encode())

    run(tmp_path, scenario, stalling(17), stalling(17))


class Mute(FakeWorker):
    """Never says that a request has ended."""

    def _end(self, *arguments: object, **options: object) -> Any:
        from tandem.rpc.gen.worker.v1 import worker_service_pb2

        return worker_service_pb2.SequenceEnd(rid=10**9)


@pytest.mark.parametrize("ending", ["length", "eos", "stop string"])
def test_a_complete_answer_needs_no_other_worker(tmp_path: Path, ending: str) -> None:
    tokens = [*ids_of("xyz"), 0] if ending == "eos" else ids_of("xyzstop")
    request = text_request("ab", max_tokens=3 if ending == "length" else 60, stop=pb.StopConditions(stop=["st"]))

    num_tokens = {"length": 3, "eos": 4, "stop string": 5}[ending]

    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(request)
        await until(lambda: count(setup, "tokens", kind="output") == num_tokens)
        await setup.worker.kill()
        messages = await collect(call)
        assert "".join(message.text for message in messages) == "xyz"
        reason = pb.FINISH_REASON_LENGTH if ending == "length" else pb.FINISH_REASON_STOP
        assert messages[-1].finish_reason == reason
        assert messages[-1].usage.completion_tokens == num_tokens
        assert messages[-1].stop_token_id == 0
        assert count(setup, "resumptions", cause="worker_lost") == 0

    run(tmp_path, scenario, Mute(vocab_size=258, token=scripted(tokens), stall_after=10))


# ---- which worker ---------------------------------------------------------------------------------------------------


def test_what_refuses_a_resumed_stream_is_passed_over(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        first = await serving(setup)
        full, other = sorted((w for w in setup.workers if w is not first), key=lambda worker: worker.address)
        full.refusal = Ended(request_id=0, reason=EndReason.REJECTED, message="full", overloaded=True)
        other.stall_after = None
        await kill(first)
        assert "".join(message.text for message in await collect(call)) == "x" * 20
        assert len(full.submits) == 1
        assert count(setup, "resumptions", cause="worker_lost") == 1
        assert count(setup, "resumptions", cause="refused") == 1

    run(tmp_path, scenario, stalling(4, "x"), stalling(4, "x"), stalling(4, "x"))


def test_the_only_worker_started_again_is_another_one(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        await serving(setup)
        setup.worker.drain()
        await asyncio.sleep(0.1)
        assert len(setup.worker.submits) == 1, "a draining worker gets nothing"
        await setup.worker.kill()
        setup.worker.stall_after = None
        await setup.worker.restart()
        assert "".join(message.text for message in await collect(call)) == "x" * 20
        assert len(setup.worker.submits) == 2
        assert count(setup, "resumptions", cause="drained") == 1
        assert not setup.gateway._dispatcher._watchers

    run(tmp_path, scenario, stalling(4, "x"))


def test_a_session_that_only_broke_is_used_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "SAME_WORKER_SECONDS", 0.6)

    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        await serving(setup)
        began = time.monotonic()
        await kill(setup.worker)
        setup.worker.stall_after = None
        await setup.worker.start(int(setup.worker.address.rpartition(":")[2]))
        assert "".join(message.text for message in await collect(call)) == "x" * 20
        assert time.monotonic() - began > 0.5

    run(tmp_path, scenario, stalling(4, "x"))


def test_prefill_workers_that_know_the_handoff_are_named_first(tmp_path: Path) -> None:
    """The first token has come, the second has not: the hand-off may be leased, or it may be over."""

    async def scenario(setup: Setup) -> None:
        idle, busy, first, second = setup.workers
        fleet = setup.gateway.fleet
        fleet.worker(idle.address).prefill_tokens = 50
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        stalled = await serving(setup)
        other = first if stalled is second else second
        fleet.worker(idle.address).prefill_tokens = 0
        fleet.worker(busy.address).prefill_tokens = 70
        await kill(stalled)
        await until(lambda: other.inflight == 1)
        assert fleet.worker(busy.address).prefill_tokens == 70, "its part is done: the first token is here"
        other.stall_after = None
        other.sessions[0].wake.set()
        await collect(call)
        (before,), (after,) = stalled.submits[0].prefill, other.submits[0].prefill[:1]
        assert before.handoff_address == busy.address
        assert (after.handoff_id, after.attempt, after.output_tokens) == (before.handoff_id, 2, 0)
        fresh, unknown = other.submits[0].prefill[1:]
        assert (fresh.handoff_address, fresh.attempt, fresh.output_tokens) == (busy.address, 1, 1)
        assert fresh.handoff_id != before.handoff_id
        assert (unknown.handoff_address, unknown.attempt, unknown.output_tokens) == (idle.address, 1, 1)
        assert fleet.worker(busy.address).prefill_tokens == 70
        assert fleet.worker(busy.address).prefills == fleet.worker(idle.address).prefills == 0

    workers = byte_worker("prefill"), byte_worker("prefill"), stalling(1, "x"), stalling(1, "x")
    run(tmp_path, scenario, *workers, prefill_peers=1)


def test_a_handoff_that_is_over_is_not_named(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        prefill, *_ = setup.workers
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        stalled = await serving(setup)
        other = next(worker for worker in setup.workers[1:] if worker is not stalled)
        other.stall_after = None
        await kill(stalled)
        await collect(call)
        (before,), (after,) = stalled.submits[0].prefill, other.submits[0].prefill
        assert after.handoff_id != before.handoff_id
        assert (after.handoff_address, after.attempt, after.output_tokens) == (prefill.address, 1, 2)
        assert setup.gateway.fleet.worker(prefill.address).prefill_tokens == 0

    run(tmp_path, scenario, byte_worker("prefill"), stalling(2, "x"), stalling(2, "x"))


def test_a_resumption_is_in_the_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=20))
        first = await serving(setup)
        next(worker for worker in setup.workers if worker is not first).stall_after = None
        await kill(first)
        await collect(call)

    run(tmp_path, scenario, stalling(4, "x"), stalling(4, "x"))
    (line,) = [getattr(record, "fields", {}) for record in caplog.records if record.message == "request ended"]
    assert line["resumptions"] == 1
    lost = [record for record in caplog.records if record.levelname == "WARNING" and " lost " in record.message]
    assert len(lost) == 1, "not those of its own stop"

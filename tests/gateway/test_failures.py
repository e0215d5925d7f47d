"""What happens when clients go, workers die, time runs out or there is too much: over real sockets."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.core.messages.requests import Ended, EndReason
from tandem.errors import DeadlineExceeded, InvalidRequest, NoWorker, Overloaded
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.fakes.worker import FakeWorker, hashed_token, scripted
from tests.gateway.harness import Setup, byte_worker, collect, failure, run, text_request, until
from tests.gateway.model import ids_of
from tests.gateway.resumption_rig import count


def endless(**options: Any) -> FakeWorker:
    return byte_worker(token=scripted(ids_of("x")), step_seconds=0.005, **options)


@pytest.mark.parametrize("stall_after", [0, 3, None])
def test_client_cancel_reaches_the_worker(tmp_path: Path, stall_after: int | None) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=400))
        await until(lambda: setup.worker.inflight == 1)
        if stall_after != 0:
            await call.read()
        call.cancel()
        _, reason, _ = await setup.worker.aborted()
        assert reason == ""
        await until(lambda: setup.gateway.admission.inflight == 0)
        assert setup.worker.inflight == 0

    run(tmp_path, scenario, endless(stall_after=stall_after))


def test_lost_client_connection_reaches_the_worker(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=400, sampling=pb.SamplingParams(n=3)))
        await until(lambda: setup.worker.inflight == 3)
        await setup.channel.close()
        for _ in range(3):
            await setup.worker.aborted()
        assert setup.worker.inflight == 0
        await until(lambda: setup.gateway.admission.inflight == 0)
        del call

    run(tmp_path, scenario, endless())


def test_unary_cancel_reaches_the_worker(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.Generate(text_request("ab", max_tokens=400))
        await until(lambda: setup.worker.inflight == 1)
        call.cancel()
        await setup.worker.aborted()

    run(tmp_path, scenario, endless(stall_after=2))


def test_client_deadline_travels_and_ends_the_request(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        started = time.monotonic()
        code, _ = await failure(setup.stub.StreamGenerate(text_request("ab", max_tokens=400), timeout=3.0))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started > 2.5
        (submit,) = setup.worker.submits
        assert 0 < submit.timeout.ToMicroseconds() / 1e6 < 3.0
        await until(lambda: setup.worker.inflight == 0)
        await until(lambda: setup.gateway.admission.inflight == 0)

    run(tmp_path, scenario, endless(stall_after=2))


def test_the_gateways_own_cap_is_a_deadline(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        code, error = await failure(setup.stub.StreamGenerate(text_request("ab", max_tokens=400)))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert isinstance(error, DeadlineExceeded)
        await setup.worker.aborted()

    run(tmp_path, scenario, endless(stall_after=2), request_seconds_max=2.0)


def test_a_worker_that_dies_before_the_first_token_is_replaced(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=5))
        await until(lambda: sum(worker.inflight for worker in setup.workers) == 1)
        stalled = next(worker for worker in setup.workers if worker.inflight)
        other = next(worker for worker in setup.workers if worker is not stalled)
        other.stall_after = None
        await stalled.kill()
        assert "".join(message.text for message in await collect(call)) == "xxxxx"
        assert len(other.submits) == 1

    run(tmp_path, scenario, endless(stall_after=0), endless(stall_after=0))


def test_a_replacement_attaches_to_the_same_handoff(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        prefill, first, second = setup.workers
        call = setup.stub.StreamGenerate(text_request("ab", max_tokens=5))
        await until(lambda: first.inflight + second.inflight == 1)
        assert setup.gateway.fleet.worker(prefill.address).prefills == 1
        stalled, other = (first, second) if first.inflight else (second, first)
        other.stall_after = None
        await stalled.kill()
        await collect(call)
        (before,), (after, fresh) = stalled.submits[0].prefill, other.submits[0].prefill
        assert fresh.handoff_id != before.handoff_id, "in case the first one is over"
        assert before.handoff_address == prefill.address
        assert before.instance_id == prefill.instance_id
        assert (before.attempt, after.attempt) == (1, 2)
        assert before.handoff_id == after.handoff_id
        assert len(before.handoff_id) == 16
        assert setup.gateway.fleet.worker(prefill.address).prefills == 0
        assert setup.gateway.fleet.worker(prefill.address).prefill_tokens == 0

    run(tmp_path, scenario, byte_worker("prefill"), endless(stall_after=0), endless(stall_after=0))


def test_a_unary_call_starts_again_as_its_client_has_seen_nothing(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        call = setup.stub.Generate(text_request("ab", max_tokens=5))
        await until(lambda: count(setup, "tokens", kind="output") == 2)
        stalled = next(worker for worker in setup.workers if worker.inflight)
        for worker in setup.workers:
            worker.stall_after = None if worker is not stalled else 2
        await stalled.kill()
        answer = await call
        assert answer.choices[0].text == "xxxxx"
        assert answer.usage.completion_tokens == 5

    run(tmp_path, scenario, endless(stall_after=2), endless(stall_after=2))


def test_without_a_ready_decode_worker_nothing_is_served(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        for call in (setup.stub.Generate(text_request("ab")), setup.stub.StreamGenerate(text_request("ab"))):
            code, error = await failure(call)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert isinstance(error, NoWorker)
            # A client's retry policy tries again only what was refused before any headers.
            assert "x-request-id" not in dict(await call.initial_metadata())

    run(tmp_path, scenario, byte_worker("prefill"))
    run(tmp_path, scenario, byte_worker(state="draining"), ready=False)


def test_a_worker_that_comes_back_serves_again(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        port = int(setup.worker.address.rpartition(":")[2])
        await setup.worker.kill()
        await until(lambda: not setup.gateway.fleet.serves)
        await setup.worker.start(port)
        await until(lambda: setup.gateway.fleet.serves, 10)
        await setup.stub.Generate(text_request("ab"))
        assert setup.worker.num_sessions == 2

    run(tmp_path, scenario)


def test_too_many_requests_are_refused_with_a_retry_hint(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        calls = [setup.stub.StreamGenerate(text_request("ab", max_tokens=400)) for _ in range(2)]
        await until(lambda: setup.worker.inflight == 2)
        code, error = await failure(setup.stub.StreamGenerate(text_request("ab")))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error, Overloaded)
        assert error.reason == "GATEWAY_FULL"
        assert error.retry_after_seconds == 1.0
        for call in calls:
            call.cancel()
        await until(lambda: setup.gateway.admission.inflight == 0)

    run(tmp_path, scenario, endless(stall_after=1), max_inflight_requests=2)


def test_what_a_worker_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        setup.worker.refusal = Ended(
            request_id=0, reason=EndReason.REJECTED, message="does not fit", field_name="sampling.max_tokens"
        )
        code, error = await failure(setup.stub.Generate(text_request("ab")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, InvalidRequest)
        assert (error.message, error.field) == ("does not fit", "sampling.max_tokens")
        setup.worker.refusal = Ended(request_id=0, reason=EndReason.REJECTED, message="full", overloaded=True)
        code, _ = await failure(setup.stub.Generate(text_request("ab")))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        setup.worker.refusal = Ended(request_id=0, reason=EndReason.FAILED, message="NaN")
        code, _ = await failure(setup.stub.StreamGenerate(text_request("ab")))
        assert code is grpc.StatusCode.INTERNAL

    run(tmp_path, scenario)


def test_a_full_worker_is_passed_over_once(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        first = min(setup.workers, key=lambda worker: worker.address)
        first.refusal = Ended(request_id=0, reason=EndReason.REJECTED, message="full", overloaded=True)
        await setup.stub.Generate(text_request("ab"))
        assert [len(worker.submits) for worker in setup.workers] == [1, 1]

    run(tmp_path, scenario, byte_worker(), byte_worker())


def test_a_client_that_does_not_read_loses_its_request_only(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request("ab", max_tokens=100_000, output=pb.OutputOptions(logprobs=20))
        slow = setup.stub.StreamGenerate(request)
        await setup.worker.aborted()
        other = await collect(setup.stub.StreamGenerate(text_request("ab", max_tokens=50)))
        assert "".join(message.text for message in other) == "x" * 50
        code, error = await failure(slow)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.reason == "SLOW_CLIENT"
        await until(lambda: setup.gateway.admission.inflight == 0)

    worker = byte_worker(token=scripted(ids_of("x")), tokens_per_step=50, max_context_tokens=0, max_total_num_tokens=0)
    run(tmp_path, scenario, worker, stream_buffer_tokens=500)


def test_a_client_that_never_reads_is_cut_after_its_deadline(tmp_path: Path) -> None:
    async def scenario(setup: Setup) -> None:
        request = text_request("ab", max_tokens=100_000, output=pb.OutputOptions(logprobs=20))
        calls = [setup.stub.StreamGenerate(request) for _ in range(2)]
        for _ in calls:
            await setup.worker.aborted()
        assert setup.gateway.admission.inflight == 2  # the handlers hang in their writes
        await until(lambda: setup.gateway.admission.inflight == 0)
        code, error = await failure(calls[0])
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not read" in error.message
        calls[1].cancel()

    worker = byte_worker(token=scripted(ids_of("x")), tokens_per_step=50, max_context_tokens=0, max_total_num_tokens=0)
    run(tmp_path, scenario, worker, stream_buffer_tokens=500, request_seconds_max=8.0)


def test_two_hundred_streams_at_once_are_all_exact(tmp_path: Path) -> None:
    async def one(setup: Setup, number: int) -> None:
        prompt = [3 + number % 250, 3 + number // 250, 9]
        length = 1 + number % 40
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(max_tokens=length),
            output=pb.OutputOptions(return_token_ids=True, skip_special_tokens=False),
            stop=pb.StopConditions(ignore_eos=True),
        )
        messages = await collect(setup.stub.StreamGenerate(request))
        got = [token for message in messages for token in message.token_ids]
        assert got == [token_of(prompt, index) for index in range(length)]
        assert messages[-1].usage.completion_tokens == length

    async def scenario(setup: Setup) -> None:
        await asyncio.gather(*(one(setup, number) for number in range(200)))
        assert all(worker.inflight == 0 for worker in setup.workers)
        assert all(len(worker.submits) > 50 for worker in setup.workers)
        assert setup.gateway.admission.inflight == 0

    run(tmp_path, scenario, byte_worker(token=token_of), byte_worker(token=token_of))


def token_of(prompt: list[int], index: int) -> int:
    return hashed_token(prompt, index) % 258

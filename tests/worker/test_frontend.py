"""WorkerService over real gRPC; the test plays the rank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio

from tandem.core.messages.requests import Cancel, CancelCause, Ended, EndReason, Submit, Tokens
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.core.messages.worker import Stats, WorkerInfo
from tandem.core.stats import LoadSnapshot
from tandem.core.token_ids import pack
from tandem.errors import TandemError
from tandem.rpc import convert, status
from tandem.rpc.convert_worker import PROTOCOL_VERSION, worker_info
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as inference_pb2
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import WorkerServiceStub, add_WorkerServiceServicer_to_server
from tandem.rpc.server import RpcServer
from tandem.worker.frontend import Frontend
from tandem.worker.messages import StepEnded
from tests.worker.streams import VOCAB_SIZE, Events, rank_ready

STARTING = WorkerInfo(worker_id="w", instance_id=b"i" * 16, role="decode", state="starting", model="m", fingerprint="")


class Bench:
    """A frontend on a port; `rank` gets what it tells the rank."""

    def __init__(self) -> None:
        self.rank = Events()
        self.frontend = Frontend(self.rank.put, STARTING)
        self.server = RpcServer()
        self.channel: aio.Channel
        self.step = 0

    async def start(self, *, ready: bool = True) -> None:
        self.server.add(add_WorkerServiceServicer_to_server, self.frontend, "tandem.worker.v1.WorkerService")
        port = self.server.listen("127.0.0.1", 0)
        await self.server.start()
        self.frontend.start()
        if ready:
            self.become_ready()
        self.channel = aio.insecure_channel(f"127.0.0.1:{port}")

    def become_ready(self) -> None:
        ready = rank_ready("decode")
        self.frontend.open_for(ready, worker_info(ready, worker_id="w", instance_id=b"i" * 16))

    def say(self, *messages: Tokens | Ended) -> None:
        """One turn of the rank's loop."""
        for message in messages:
            if isinstance(message, Tokens):
                self.frontend.tokens(message)
            else:
                self.frontend.ended(message)
        self.step += 1
        self.frontend.step_ended(StepEnded(self.step, self.step * 1000))

    async def session(self) -> Session:
        call = WorkerServiceStub(self.channel).Session()
        await call.write(
            worker_pb2.SessionRequest(hello=worker_pb2.Hello(gateway_id="g", protocol_version=PROTOCOL_VERSION))
        )
        session = Session(call)
        session.info = await session.until(lambda frame: frame.HasField("info"))
        return session


class Session:
    def __init__(self, call: Any) -> None:
        self.call = call
        self.info = worker_pb2.SessionResponse()

    async def submit(self, rid: int, prompt: list[int] | None = None, **options: Any) -> None:
        submit = Submit(
            request_id=rid,
            prompt_token_ids=pack(prompt or [1, 2, 3]),
            sampling=options.pop("sampling", SamplingParams()),
        )
        message = convert.submit_to_proto(submit)
        for name, value in options.items():
            setattr(message, name, value)
        await self.call.write(worker_pb2.SessionRequest(submit=message))

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(5.0):
            while True:
                frame = await self.call.read()
                assert frame is not aio.EOF
                if condition(frame):
                    return frame

    async def output(self) -> Any:
        """The next frame with anything about requests."""
        return await self.until(lambda frame: bool(frame.deltas or frame.ends))

    async def error(self) -> TandemError:
        """The error of the next request that ends with one."""
        frame = await self.until(lambda frame: bool(frame.ends))
        assert frame.ends[0].HasField("error")
        return status.from_status(frame.ends[0].error)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.start(**options)
    try:
        yield bench
    finally:
        await bench.channel.close()
        await bench.frontend.close()
        await bench.server.stop(0)


def tokens(submit: Submit, first_index: int, *token_ids: int, **options: Any) -> Tokens:
    return Tokens(submit.request_id, first_index, token_ids, **options)


def test_a_step_is_one_frame_with_everything_about_the_session() -> None:
    async def scenario() -> None:
        async with running() as bench:
            session, other = await bench.session(), await bench.session()
            for rid in (7, 8):
                await session.submit(rid)
            first, second = [await bench.rank.next(Submit) for _ in range(2)]
            await other.submit(7)  # sessions may overtake each other
            foreign = await bench.rank.next(Submit)
            assert len({first.request_id, second.request_id, foreign.request_id}) == 3
            logprob = TokenLogprob(5, -0.5, ((6, -1.0),))
            bench.say(
                tokens(first, 0, 5, logprobs=(logprob,)),
                tokens(foreign, 0, 9),
                tokens(second, 0, 4),
                Ended(request_id=second.request_id, reason=EndReason.STOP, stop_token_id=4, completion_tokens=1),
            )
            frame = await session.output()
            assert (frame.step, frame.mono_ns) == (1, 1000)
            assert [(delta.rid, list(delta.token_ids)) for delta in frame.deltas] == [(7, [5]), (8, [4])]
            assert frame.deltas[0].logprobs[0].top[0].token_id == 6
            assert [(end.rid, end.finish_reason, end.stop_token_id) for end in frame.ends] == [
                (8, inference_pb2.FINISH_REASON_STOP, 4)
            ]
            assert frame.ends[0].timing.decode_worker == "w"
            assert [delta.rid for delta in (await other.output()).deltas] == [7]

    asyncio.run(scenario())


def test_the_first_frame_is_the_info_and_changes_follow() -> None:
    async def scenario() -> None:
        async with running(ready=False) as bench:
            session = await bench.session()
            assert session.info.info.state == worker_pb2.WORKER_STATE_STARTING
            await session.submit(1)
            assert (await session.error()).reason == "UNAVAILABLE"
            bench.become_ready()
            ready = await session.until(lambda frame: frame.HasField("info"))
            assert ready.info.state == worker_pb2.WORKER_STATE_READY
            assert (ready.info.max_req_input_len, ready.info.vocab_size) == (63, VOCAB_SIZE)
            bench.frontend.set_state("draining")
            draining = await session.until(lambda frame: frame.HasField("info"))
            assert draining.info.state == worker_pb2.WORKER_STATE_DRAINING
            info = await WorkerServiceStub(bench.channel).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
            assert info.info == draining.info

    asyncio.run(scenario())


def test_a_draining_worker_hands_back_what_comes_late() -> None:
    """Of several replicas those without work have ended; a request must not vanish in them."""

    async def scenario() -> None:
        async with running() as bench:
            session = await bench.session()
            await session.submit(1)
            await bench.rank.next(Submit)
            bench.frontend.set_state("draining")
            await session.submit(2)
            assert (await session.error()).reason == "DRAINING"
            await bench.rank.nothing(0)

    asyncio.run(scenario())


def test_load_comes_when_it_changes_and_as_a_heartbeat() -> None:
    async def scenario() -> None:
        async with running() as bench:
            session = await bench.session()
            bench.frontend.stats(Stats(LoadSnapshot(running_requests=3)))
            first = await session.until(lambda frame: frame.HasField("load"))
            second = await session.until(lambda frame: frame.HasField("load"))
            assert first.load.running_requests == second.load.running_requests == 3
            assert second.load.seq > first.load.seq

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([VOCAB_SIZE], {}, "prompt"),
        ([1] * 64, {}, "prompt"),
        ([1], {"prompt_token_ids": b""}, "prompt"),
        ([1], {"prompt_token_ids": b"12345"}, "prompt"),
        ([1], {"output_token_ids": pack([VOCAB_SIZE])}, "output_token_ids"),
        ([1], {"output_token_ids": pack([1] * 64)}, "output_token_ids"),
        ([1], {"sampling": SamplingParams(temperature=-1.0)}, "sampling.temperature"),
        ([1], {"sampling": SamplingParams(logit_bias=((VOCAB_SIZE, 1.0),))}, "sampling.logit_bias"),
        ([1], {"lora_adapter": "a"}, "lora_adapter"),
    ],
)
def test_a_request_at_fault_ends_and_the_session_goes_on(
    prompt: list[int], options: dict[str, Any], field: str
) -> None:
    async def scenario() -> None:
        async with running() as bench:
            session = await bench.session()
            await session.submit(1, prompt, **options)
            error = await session.error()
            assert getattr(error, "field", None) == field
            await bench.rank.nothing(0)
            await session.submit(1)  # the rid is free again
            await bench.rank.next(Submit)

    asyncio.run(scenario())


def test_aborts_and_the_loss_of_a_session_cancel_with_their_cause() -> None:
    async def scenario() -> None:
        async with running() as bench:
            session = await bench.session()
            for rid in (1, 2, 3):
                await session.submit(rid)
            submits = [await bench.rank.next(Submit) for _ in range(3)]
            for rid, reason in ((1, "STOP"), (2, ""), (99, "")):
                await session.call.write(worker_pb2.SessionRequest(abort=worker_pb2.Abort(rid=rid, reason=reason)))
            assert await bench.rank.next(Cancel) == Cancel(submits[0].request_id, CancelCause.STOP_STRING)
            assert await bench.rank.next(Cancel) == Cancel(submits[1].request_id, CancelCause.CLIENT)
            bench.say(*(Ended(request_id=submit.request_id, reason=EndReason.CANCELLED) for submit in submits[:2]))
            session.call.cancel()
            assert await bench.rank.next(Cancel) == Cancel(submits[2].request_id, CancelCause.SESSION_LOST)
            await bench.rank.nothing()
            bench.say(tokens(submits[2], 0, 5), Ended(request_id=submits[2].request_id, reason=EndReason.CANCELLED))
            assert bench.frontend.num_requests == 0

    asyncio.run(scenario())


def test_a_stream_interval_gathers_tokens_but_never_the_first() -> None:
    async def scenario() -> None:
        async with running() as bench:
            session = await bench.session()
            await session.submit(1, stream_interval=3)
            submit = await bench.rank.next(Submit)
            got = []
            for index in range(6):
                bench.say(tokens(submit, index, index))
            bench.say(Ended(request_id=submit.request_id, reason=EndReason.LENGTH))
            ended = False
            while not ended:
                frame = await session.output()
                got += [(delta.first_index, list(delta.token_ids)) for delta in frame.deltas]
                ended = bool(frame.ends)
            assert got == [(0, [0]), (1, [1, 2, 3]), (4, [4, 5])]

    asyncio.run(scenario())


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not aio.EOF:
        pass


@pytest.mark.parametrize(
    "requests",
    [
        [worker_pb2.SessionRequest(abort=worker_pb2.Abort(rid=1))],
        [worker_pb2.SessionRequest(hello=worker_pb2.Hello(protocol_version=PROTOCOL_VERSION + 1))],
        [
            worker_pb2.SessionRequest(hello=worker_pb2.Hello(protocol_version=PROTOCOL_VERSION)),
            worker_pb2.SessionRequest(hello=worker_pb2.Hello(protocol_version=PROTOCOL_VERSION)),
        ],
    ],
)
def test_a_gateway_that_breaks_the_protocol_loses_its_session(requests: list[Any]) -> None:
    async def scenario() -> None:
        async with running() as bench:
            call = WorkerServiceStub(bench.channel).Session()
            for request in requests:
                await call.write(request)
            with pytest.raises(aio.AioRpcError) as caught:
                await read_to_the_end(call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_a_gateway_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.worker.frames.MAX_UNREAD_BYTES", 1 << 20)

    async def scenario() -> None:
        async with running() as bench:
            session = await bench.session()
            await session.submit(1)
            submit = await bench.rank.next(Submit)
            prompt_logprobs = tuple(TokenLogprob(5, -0.5, ((6, -1.0),) * 20) for _ in range(1000))
            for index in range(400):
                bench.say(tokens(submit, index, 1, prompt_logprobs=prompt_logprobs))
                if bench.frontend.num_requests == 0:
                    break
                await asyncio.sleep(0.001)
            assert await bench.rank.next(Cancel) == Cancel(submit.request_id, CancelCause.SESSION_LOST)
            with pytest.raises(aio.AioRpcError) as caught:
                await read_to_the_end(session.call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(scenario())


def test_one_request_per_call() -> None:
    async def scenario() -> None:
        async with running() as bench:
            submit = convert.submit_to_proto(
                Submit(request_id=0, prompt_token_ids=pack([1]), sampling=SamplingParams())
            )
            call = WorkerServiceStub(bench.channel).Generate(worker_pb2.GenerateRequest(submit=submit), timeout=30)
            received = await bench.rank.next(Submit)
            assert received.timeout_seconds is not None and received.timeout_seconds > 20
            bench.say(tokens(received, 0, 5))
            bench.say(Ended(request_id=received.request_id, reason=EndReason.LENGTH))
            answers = [answer async for answer in call]
            assert [list(answer.delta.token_ids) for answer in answers] == [[5], []]
            assert answers[1].end.finish_reason == inference_pb2.FINISH_REASON_LENGTH

            call = WorkerServiceStub(bench.channel).Generate(worker_pb2.GenerateRequest(submit=submit))
            received = await bench.rank.next(Submit)
            call.cancel()
            assert await bench.rank.next(Cancel) == Cancel(received.request_id, CancelCause.CLIENT)

            submit.prompt_token_ids = b""
            with pytest.raises(aio.AioRpcError) as caught:
                async for _ in WorkerServiceStub(bench.channel).Generate(worker_pb2.GenerateRequest(submit=submit)):
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_events_of_the_cache_are_not_there_yet() -> None:
    async def scenario() -> None:
        async with running() as bench:
            with pytest.raises(aio.AioRpcError) as caught:
                async for _ in WorkerServiceStub(bench.channel).WatchKvEvents(worker_pb2.WatchKvEventsRequest()):
                    pass
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(scenario())

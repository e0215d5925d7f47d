"""WorkerService: sessions of gateways, single requests, and what this worker says about itself. No torch here.

A request that is at fault ends with an error in its SequenceEnd, and the session goes on; only a gateway that breaks
the protocol, or does not read, loses its session. A lost session ends its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
from grpc import aio

from tandem.core.messages.requests import CancelCause, Ended, Tokens
from tandem.core.messages.worker import AdaptersChanged, RankReady, Stats, WorkerInfo, WorkerState
from tandem.core.stats import LoadSnapshot
from tandem.errors import Draining, InvalidRequest, Overloaded, TandemError, Unavailable
from tandem.rpc import convert, convert_worker, status
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as inference_pb2
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.rpc.gen.worker.v1 import worker_service_pb2_grpc as worker_grpc
from tandem.telemetry.tracing import Tracer
from tandem.worker.load_rates import LoadRates
from tandem.worker.messages import StepEnded
from tandem.worker.request_table import GatewaySession, RequestTable
from tandem.worker.spans import WorkerSpans
from tandem.worker.submit_rules import check_submit

MAX_SESSIONS = 1024
HELLO_SECONDS = 10.0
HEARTBEAT_SECONDS = 1.0  # an idle worker repeats its load so often
_SINGLE_RID = 1  # of the only request of a Generate call
_SessionContext = aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionResponse]
_GenerateContext = aio.ServicerContext[worker_pb2.GenerateRequest, worker_pb2.GenerateResponse]
_Requests = AsyncIterator[worker_pb2.SessionRequest]


class Frontend(worker_grpc.WorkerServiceServicer):
    """The servicer, and the receiver of what the rank says about requests. `send` takes messages for the rank."""

    def __init__(self, send: Callable[[object], None], info: WorkerInfo, spans: WorkerSpans | None = None) -> None:
        self._spans = spans or WorkerSpans(Tracer.off())
        self._table = RequestTable(send, info.worker_id)
        self._info = info
        self._ready: RankReady | None = None
        self._load = LoadSnapshot()
        self._rates = LoadRates()
        self._sessions: set[GatewaySession] = set()
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def info(self) -> WorkerInfo:
        return self._info

    @property
    def num_requests(self) -> int:
        return len(self._table)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def load(self) -> LoadSnapshot:
        return self._load

    def start(self) -> None:
        """Repeat the load to sessions from now on."""
        self._heartbeat = asyncio.create_task(self._beat(), name="heartbeat")

    def open_for(self, ready: RankReady, info: WorkerInfo) -> None:
        """Take requests from now on."""
        self._ready = ready
        self._announce(info)

    def set_state(self, state: WorkerState) -> None:
        """Tell every session that the state has changed."""
        self._announce(replace(self._info, state=state))

    async def close(self) -> None:
        """End every session, after what waits there has been sent."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        for session in self._sessions:
            session.frames.close()

    def _announce(self, info: WorkerInfo) -> None:
        self._info = info
        message = convert_worker.worker_info_to_proto(info)
        for session in self._sessions:
            session.frames.set_info(message)

    # ---- from the rank --------------------------------------------------------------------------------------------

    def tokens(self, tokens: Tokens) -> None:
        self._table.tokens(tokens)

    def ended(self, ended: Ended) -> None:
        self._spans.ended(ended)
        self._table.ended(ended)

    def adapters_changed(self, changed: AdaptersChanged) -> None:
        """Take requests for these adapters from now on, and tell every session."""
        if self._ready is not None:
            self._ready = replace(self._ready, adapters=changed.adapters)
            self._announce(replace(self._info, adapters=changed.adapters))

    def step_ended(self, step: StepEnded) -> None:
        self._table.step_ended(step.step, step.mono_ns)

    def stats(self, stats: Stats) -> None:
        self._load = stats.load
        self._send_load()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._send_load()

    def _send_load(self) -> None:
        if self._sessions:
            message = self._rates.to_proto(self._load, time.monotonic())
            for session in self._sessions:
                session.frames.set_load(message)

    # ---- gRPC -----------------------------------------------------------------------------------------------------

    async def Session(
        self, request_iterator: _Requests, context: _SessionContext
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        if len(self._sessions) >= MAX_SESSIONS:
            raise Overloaded(f"{MAX_SESSIONS} sessions are open")
        await _expect_hello(request_iterator)
        session = GatewaySession()
        session.frames.set_info(convert_worker.worker_info_to_proto(self._info))
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, request_iterator), name="session reader")
        try:
            while (frame := await session.frames.next()) is not None:
                yield frame
        finally:
            reader.cancel()
            self._sessions.discard(session)
            self._table.drop(session, CancelCause.SESSION_LOST)
        if session.frames.overflowed:
            raise Overloaded("the session was not read", reason="SLOW_GATEWAY")
        if reader.done() and not reader.cancelled() and (error := reader.exception()) is not None:
            raise error

    async def Generate(
        self, request: worker_pb2.GenerateRequest, context: _GenerateContext
    ) -> AsyncIterator[worker_pb2.GenerateResponse]:
        submit = request.submit
        submit.rid = _SINGLE_RID
        remaining = context.time_remaining()
        if remaining is not None and not submit.HasField("timeout"):
            submit.timeout.FromMilliseconds(round(remaining * 1000))
        session = GatewaySession()
        self._submit(session, submit)
        try:
            while (frame := await session.frames.next()) is not None:
                for delta in frame.deltas:
                    yield worker_pb2.GenerateResponse(delta=delta)
                for end in frame.ends:
                    if end.HasField("error"):
                        raise status.from_status(end.error)
                    yield worker_pb2.GenerateResponse(end=end)
                    return
        finally:
            self._table.drop(session, CancelCause.CLIENT)
        raise Overloaded("the output was not read", reason="SLOW_CLIENT")

    async def GetWorkerInfo(
        self, request: worker_pb2.GetWorkerInfoRequest, context: aio.ServicerContext[Any, Any]
    ) -> worker_pb2.GetWorkerInfoResponse:
        return worker_pb2.GetWorkerInfoResponse(info=convert_worker.worker_info_to_proto(self._info))

    async def WatchKvEvents(
        self, request: worker_pb2.WatchKvEventsRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.WatchKvEventsResponse]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker publishes no KV events")
        yield worker_pb2.WatchKvEventsResponse()

    async def _read(self, session: GatewaySession, requests: _Requests) -> None:
        """Take what the gateway says until it stops; then the session is over."""
        try:
            async for request in requests:
                if session.frames.overflowed:
                    return
                match request.WhichOneof("op"):
                    case "submit":
                        self._submit(session, request.submit)
                    case "abort":
                        stop = request.abort.reason == convert.ABORT_STOP
                        cause = CancelCause.STOP_STRING if stop else CancelCause.CLIENT
                        self._table.abort(session, request.abort.rid, cause)
                    case _:
                        raise InvalidRequest("only Submit and Abort may follow Hello")
        finally:
            session.frames.close()

    def _submit(self, session: GatewaySession, message: worker_pb2.Submit) -> None:
        if message.rid in session.request_ids:
            raise InvalidRequest(f"rid {message.rid} is in use", field="rid")
        try:
            if self._ready is None:
                raise Unavailable("this worker is starting")
            if self._info.state == "draining":
                raise Draining("the worker is stopping")  # the replica that it would go to may have ended already
            submit = convert.submit_from_proto(message, self._table.next_request_id())
            check_submit(submit, self._ready)
        except TandemError as error:
            end = worker_pb2.SequenceEnd(
                rid=message.rid,
                finish_reason=inference_pb2.FINISH_REASON_ABORT,
                error=status.to_status(error),
            )
            session.frames.add_end(end)
            session.frames.send(0, time.monotonic_ns())
            return
        self._spans.submitted(submit, message.traceparent)
        self._table.submit(session, message.rid, submit, message.stream_interval)


async def _expect_hello(requests: _Requests) -> None:
    first = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HELLO_SECONDS):
            first = await anext(requests, None)
    if first is None or first.WhichOneof("op") != "hello":
        raise InvalidRequest("a session begins with Hello")
    if first.hello.protocol_version != convert_worker.PROTOCOL_VERSION:
        raise InvalidRequest(
            f"protocol version {first.hello.protocol_version}, this worker speaks {convert_worker.PROTOCOL_VERSION}",
            field="hello.protocol_version",
        )

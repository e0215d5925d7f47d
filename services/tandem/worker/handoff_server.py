"""Prefill's side of the hand-off streams: HandoffService in, OpenReceived, ReleaseReceived and StreamLost to the rank;
the rank's Send* and EndStream out.

Only a Release message is a release. A half-close, a cancel, a reset, a failed keepalive and a message that makes no
sense are all StreamLost: what follows from that (the lease) is the scheduler's decision.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc import aio

from tandem.core.messages.handoff import (
    EndCode,
    EndStream,
    Open,
    OpenReceived,
    ReleaseReceived,
    SendAccepted,
    SendAnnounce,
    SendComplete,
    SendFirstToken,
    StreamLost,
)
from tandem.core.messages.worker import RankReady
from tandem.core.token_ids import BYTES_PER_TOKEN, unpack
from tandem.errors import InvalidRequest
from tandem.rpc.gen.handoff.v1 import handoff_service_pb2 as handoff_pb2
from tandem.rpc.gen.handoff.v1 import handoff_service_pb2_grpc as handoff_grpc
from tandem.rpc.handoff_status import INSTANCE_METADATA, abort
from tandem.rpc.handoff_wire import Response, open_from_proto, release_from_proto, response_to_proto
from tandem.rpc.sampling_rules import check_sampling, check_token_ids
from tandem.telemetry.tracing import Tracer
from tandem.worker.spans import ExportSpan, WorkerSpans

MAX_STREAMS = 8192
MAX_UNREAD_RESPONSES = 1 << 16  # of one stream; an importer that does not read is cut off
OPEN_SECONDS = 10.0  # a stream that says nothing for so long is ended
_Context = aio.ServicerContext[handoff_pb2.HandoffRequest, handoff_pb2.HandoffResponse]
_Requests = AsyncIterator[handoff_pb2.HandoffRequest]
_logger = logging.getLogger(__name__)


class _Stream:
    """What waits to be sent on one stream, and how it ends. `finish` is idempotent: the first end counts."""

    def __init__(self, stream_id: int, span: ExportSpan) -> None:
        self.stream_id = stream_id
        self.span = span
        self.released = False
        self._responses: deque[Response] = deque()
        self._changed = asyncio.Event()
        self.end: tuple[EndCode, str] | None = None

    def put(self, response: Response) -> bool:
        """Queue a message; False, and the stream is at its end, if too many are unread."""
        if len(self._responses) >= MAX_UNREAD_RESPONSES:
            self._responses.clear()
            self.finish(EndCode.LOST, f"{MAX_UNREAD_RESPONSES} messages were not read")
            return False
        self._responses.append(response)
        self._changed.set()
        return True

    def finish(self, code: EndCode, message: str) -> None:
        if self.end is None:
            self.end = (code, message)
            self.span.ended(code)
            self._changed.set()

    async def responses(self) -> AsyncIterator[Response]:
        """Yield what is put, until the end; after a failure what is unsent is dropped."""
        while True:
            while self._responses and (self.end is None or self.end[0] is EndCode.OK):
                yield self._responses.popleft()
            if self.end is not None:
                return
            self._changed.clear()
            await self._changed.wait()


class HandoffServer(handoff_grpc.HandoffServiceServicer):
    """The servicer, and the receiver of the rank's effects. `send` takes events for the rank."""

    def __init__(self, send: Callable[[object], None], instance_id: bytes, spans: WorkerSpans | None = None) -> None:
        self._send = send
        self._spans = spans or WorkerSpans(Tracer.off())
        self._instance_id = instance_id
        self._ready: RankReady | None = None
        self._draining = False
        self._streams: dict[int, _Stream] = {}
        self._next_stream_id = 1

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def open_for(self, ready: RankReady) -> None:
        """Accept streams from now on."""
        self._ready = ready

    def drain(self) -> None:
        """Refuse new streams from now on."""
        self._draining = True

    # ---- the rank's effects ---------------------------------------------------------------------------------------

    def respond(self, effect: SendAccepted | SendAnnounce | SendFirstToken | SendComplete) -> None:
        """Send one message on a stream; a stream that has ended meanwhile swallows it."""
        stream = self._streams.get(effect.stream_id)
        if stream is None:
            return
        response: Response
        match effect:
            case SendAccepted(_, response) | SendAnnounce(_, response):
                pass
            case SendFirstToken(_, response) | SendComplete(_, response):
                pass
        stream.span.sent(effect)
        if not stream.put(response):
            self._lose(stream)  # here and now: the handler may be stuck in a write that nobody takes

    def end(self, effect: EndStream) -> None:
        """End a stream with a status; no StreamLost is sent for it any more."""
        stream = self._streams.pop(effect.stream_id, None)
        if stream is not None:
            stream.finish(effect.code, effect.message)

    # ---- gRPC -----------------------------------------------------------------------------------------------------

    async def Handoff(
        self, request_iterator: _Requests, context: _Context
    ) -> AsyncIterator[handoff_pb2.HandoffResponse]:
        refusal = self._refusal(context)
        if refusal is not None:
            await abort(context, *refusal)
        try:
            opened, traceparent = await self._first(request_iterator, context.time_remaining())
        except InvalidRequest as error:
            await abort(context, EndCode.INVALID, error.message)
        stream = _Stream(self._next_stream_id, self._spans.exporting(opened, traceparent))
        self._next_stream_id += 1
        self._streams[stream.stream_id] = stream
        self._send(OpenReceived(stream.stream_id, opened))
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            async with contextlib.aclosing(stream.responses()) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response_to_proto(response)
        finally:
            reader.cancel()
            stream.span.ended(None)
            self._lose(stream)
        code, message = stream.end or (EndCode.LOST, "")
        if code is not EndCode.OK:
            await abort(context, code, message)

    def _refusal(self, context: _Context) -> tuple[EndCode, str, grpc.StatusCode | None] | None:
        meant = _metadata(context, INSTANCE_METADATA)
        if meant and meant != self._instance_id.hex():
            # The worker that was meant is gone, with its pages; this one may well serve the next attempt.
            message = f"this is worker {self._instance_id.hex()}, {meant[:64]} was meant"
            return EndCode.LOST, message, grpc.StatusCode.FAILED_PRECONDITION
        if self._draining:
            return EndCode.DRAINING, "this worker is stopping", None
        if self._ready is None:
            return EndCode.LOST, "this worker is starting", grpc.StatusCode.UNAVAILABLE
        if len(self._streams) >= MAX_STREAMS:
            return EndCode.OVERLOADED, f"{MAX_STREAMS} hand-off streams are open", None
        return None

    async def _first(self, request_iterator: _Requests, timeout_seconds: float | None) -> tuple[Open, str]:
        """Return what is opened, and the traceparent with it."""
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                first = await anext(request_iterator)
        except (TimeoutError, StopAsyncIteration):
            raise InvalidRequest("the stream did not begin with Open") from None
        if first.WhichOneof("op") != "open":
            raise InvalidRequest("the first message must be Open")
        opened = open_from_proto(first.open, timeout_seconds)
        ready = self._ready
        assert ready is not None
        num_tokens = len(opened.prompt_token_ids) // BYTES_PER_TOKEN
        if num_tokens > ready.max_req_input_len:
            raise InvalidRequest(f"{num_tokens} tokens, this worker takes prompts of {ready.max_req_input_len}")
        check_token_ids(unpack(opened.prompt_token_ids), ready.vocab_size, "prompt_token_ids")
        check_sampling(opened.sampling, vocab_size=ready.vocab_size)
        return opened, first.open.traceparent

    async def _read(self, stream: _Stream, request_iterator: _Requests) -> None:
        """Wait for the Release. Everything else that may come is the loss of the stream."""
        try:
            request = await anext(request_iterator, None)
        except aio.AioRpcError as error:
            _logger.debug("hand-off stream %d: %s", stream.stream_id, error)
            request = None
        if request is None:
            self._lose(stream)
            stream.finish(EndCode.LOST, "the stream was ended without a Release")
        elif request.WhichOneof("op") != "release":
            self._lose(stream)
            stream.finish(EndCode.INVALID, "only Release may follow Open")
        else:
            stream.released = True
            self._send(ReleaseReceived(stream.stream_id, release_from_proto(request.release)))

    def _lose(self, stream: _Stream) -> None:
        """Tell the rank, once, and only of a stream that neither side has ended in order."""
        if self._streams.pop(stream.stream_id, None) is not None and not stream.released:
            self._send(StreamLost(stream.stream_id))


def _metadata(context: _Context, name: str) -> str:
    values: Any = context.invocation_metadata() or ()
    for key, value in values:
        if key == name:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""

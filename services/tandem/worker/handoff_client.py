"""Decode's side of the hand-off streams: the scheduler's OpenStream, SendRelease and DropStream, done; what comes
back as Stream* events.

One task a stream. Nothing is retried here: a stream that ends is told to the scheduler, once, and what follows is its
decision. After SendRelease or DropStream nothing is told any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc
from grpc import aio

from tandem.core.messages.handoff import (
    Accepted,
    Announce,
    Complete,
    DropStream,
    EndCode,
    FirstToken,
    OpenStream,
    ReleaseReason,
    SendRelease,
    StreamAccepted,
    StreamAnnounced,
    StreamClosed,
    StreamCompleted,
    StreamFirstToken,
)
from tandem.errors import InvalidRequest, Unavailable
from tandem.rpc.gen.handoff.v1 import handoff_service_pb2 as handoff_pb2
from tandem.rpc.gen.handoff.v1 import handoff_service_pb2_grpc as handoff_grpc
from tandem.rpc.handoff_status import INSTANCE_METADATA, end_code
from tandem.rpc.handoff_wire import Response, open_to_proto, release_to_proto, response_from_proto
from tandem.telemetry.tracing import Tracer
from tandem.worker.peer_channels import PeerChannels
from tandem.worker.spans import ImportSpan, WorkerSpans

RELEASE_SECONDS = 10.0  # how long a peer's answer to Release is awaited
MAX_EVENTS = 1 << 17  # of one stream; a peer that sends more is no exporter
_logger = logging.getLogger(__name__)
_Call = aio.StreamStreamCall[handoff_pb2.HandoffRequest, handoff_pb2.HandoffResponse]


class HandoffClient:
    """All outgoing streams of a decode worker. `send` takes the events, in order for each stream."""

    def __init__(
        self, send: Callable[[object], None], channels: PeerChannels, spans: WorkerSpans | None = None
    ) -> None:
        self._send = send
        self._channels = channels
        self._spans = spans or WorkerSpans(Tracer.off())
        self._streams: dict[int, _Stream] = {}

    @property
    def num_streams(self) -> int:
        """Streams whose task runs, those that await the peer's answer to Release included."""
        return len(self._streams)

    def open(self, effect: OpenStream) -> None:
        """Start a stream."""
        stream = _Stream(effect, self._send, self._channels, self._spans.importing(effect))
        self._streams[effect.stream_id] = stream
        stream.start(lambda: self._streams.pop(effect.stream_id, None))

    def release(self, effect: SendRelease) -> None:
        """End a stream with a Release; unknown ids have ended already."""
        stream = self._streams.get(effect.stream_id)
        if stream is not None:
            stream.release(effect.reason)

    def drop(self, effect: DropStream) -> None:
        """End a stream without a Release; unknown ids have ended already."""
        stream = self._streams.get(effect.stream_id)
        if stream is not None:
            stream.drop()

    async def close(self) -> None:
        """Give releases that are under way a moment, drop the rest, close the channels."""
        tasks = []
        for stream in list(self._streams.values()):
            if not stream.releasing:
                stream.drop()
            tasks.append(stream.task)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=1.0)
            for task in late:
                task.cancel()
        await self._channels.close()


class _Stream:
    """One hand-off stream, from OpenStream to its status."""

    def __init__(
        self, effect: OpenStream, send: Callable[[object], None], channels: PeerChannels, span: ImportSpan
    ) -> None:
        self._effect = effect
        self._span = span
        self._send = send
        self._channels = channels
        self._release: asyncio.Future[ReleaseReason] = asyncio.get_running_loop().create_future()
        self._opened = False
        self._silent = False
        self.task: asyncio.Task[None]

    @property
    def releasing(self) -> bool:
        return self._release.done()

    def start(self, ended: Callable[[], object]) -> None:
        self.task = asyncio.create_task(self._run(), name=f"hand-off {self._effect.stream_id}")
        self.task.add_done_callback(lambda task: ended())

    def release(self, reason: ReleaseReason) -> None:
        self._silent = True
        self._span.released(reason)
        if not self._release.done():
            self._release.set_result(reason)
        if not self._opened:
            self.task.cancel()  # the peer has never heard of this stream: nothing to let go of

    def drop(self) -> None:
        self._silent = True
        self._span.ended("dropped")
        self.task.cancel()

    async def _run(self) -> None:
        try:
            async with self._channels.connected(self._effect.address) as channel:
                code, message = await self._call(channel)
        except Unavailable as error:
            code, message = EndCode.LOST, error.message
        except InvalidRequest as error:
            code, message = EndCode.LOST, f"{self._effect.address} sent what no exporter sends: {error.message}"
        if code is EndCode.OK:
            code, message = EndCode.LOST, f"{self._effect.address} ended the stream before it was released"
        self._span.ended(code.value)
        if not self._silent:
            _logger.warning("hand-off from %s ended as %s: %s", self._effect.address, code.value, message)
        self._tell(StreamClosed(self._effect.stream_id, code, message))

    async def _call(self, channel: aio.Channel) -> tuple[EndCode, str]:
        opened = self._effect.open
        call: _Call = handoff_grpc.HandoffServiceStub(channel).Handoff(
            timeout=opened.timeout_seconds,
            metadata=((INSTANCE_METADATA, self._effect.instance_id.hex()),),
        )
        writer = asyncio.create_task(self._write(call))
        try:
            num_events = 0
            while isinstance(message := await call.read(), handoff_pb2.HandoffResponse):
                num_events += 1
                if num_events > MAX_EVENTS:
                    raise InvalidRequest(f"more than {MAX_EVENTS} messages")
                self._deliver(response_from_proto(message))
            return end_code(await call.code(), await call.details() or "", await call.trailing_metadata())
        except aio.AioRpcError as error:
            return end_code(error.code(), error.details() or "", error.trailing_metadata())
        finally:
            writer.cancel()
            call.cancel()

    async def _write(self, call: _Call) -> None:
        """Send Open, and Release when it is time. A call that has ended meanwhile is the reader's to report."""
        try:
            self._opened = True
            await call.write(open_to_proto(self._effect.open, self._span.traceparent))
            reason = await self._release
            async with asyncio.timeout(RELEASE_SECONDS):
                await call.write(release_to_proto(reason))
                await call.done_writing()
                if await call.code() is not grpc.StatusCode.OK:
                    _logger.debug("release of stream %d: %s", self._effect.stream_id, await call.details())
        except TimeoutError:
            _logger.warning("%s did not answer Release in %g s", self._effect.address, RELEASE_SECONDS)
            call.cancel()
        except (aio.AioRpcError, asyncio.InvalidStateError):
            return

    def _deliver(self, response: Response) -> None:
        stream_id = self._effect.stream_id
        self._span.heard(response)
        match response:
            case Accepted():
                self._tell(StreamAccepted(stream_id, response))
            case Announce():
                self._tell(StreamAnnounced(stream_id, response))
            case FirstToken():
                self._tell(StreamFirstToken(stream_id, response))
            case Complete():
                self._tell(StreamCompleted(stream_id, response))

    def _tell(self, event: object) -> None:
        if not self._silent:
            self._send(event)

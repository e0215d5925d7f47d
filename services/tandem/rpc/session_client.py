"""The gateway's side of WorkerService.Session: one stream to one worker, carrying every request for it.

The stream is read as fast as it comes, whatever clients do: what waits for a client is in its `SequenceStream`, which
is bounded. One task writes. A lost stream ends every request on it with PeerLost, and is opened again with a backoff.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable

from grpc import aio

from tandem.core.messages.requests import Submit
from tandem.core.messages.worker import WorkerInfo
from tandem.core.stats import LoadSnapshot
from tandem.errors import Overloaded, PeerLost, TandemError
from tandem.rpc import convert, convert_worker, status
from tandem.rpc.channels import open_channel, why_not_connected
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.rpc.gen.worker.v1 import worker_service_pb2_grpc as worker_grpc
from tandem.rpc.options import RECONNECT_SECONDS_MAX, RECONNECT_SECONDS_MIN
from tandem.rpc.sequence_stream import SequenceStream
from tandem.rpc.tls import ClientTls

HELLO_SECONDS = 10.0
CONNECT_SECONDS = 5.0  # then the log says why there is no connection, and another channel is tried
MAX_UNSENT = 65536  # submits and aborts that wait for the writer
_logger = logging.getLogger(__name__)
_Call = aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse]


class SessionClient:
    """The session to one worker. `info` is None while there is none; `on_change` is called when `info` changes."""

    def __init__(
        self,
        address: str,
        *,
        gateway_id: str,
        on_change: Callable[[], None],
        jitter: Callable[[], float] = random.random,
        tls: ClientTls | None = None,
    ) -> None:
        self.address = address
        self.info: WorkerInfo | None = None
        self.load = LoadSnapshot()
        self.dispatched_since_load = 0
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._jitter = jitter
        self._tls = tls
        self._trouble = ""  # why there is no session, as the log has it already
        self._streams: dict[int, SequenceStream] = {}
        self._unsent: deque[worker_pb2.SessionRequest] = deque()
        self._has_unsent = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._next_rid = 1
        self._task: asyncio.Task[None] | None = None

    @property
    def inflight(self) -> int:
        """Requests submitted here that have not ended."""
        return len(self._streams)

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        self._task = asyncio.create_task(self._run(), name=f"session {self.address}")

    async def close(self, flush_seconds: float = 1.0) -> None:
        """Send what is unsent for at most `flush_seconds`, then end the session; its requests are lost."""
        if self._task is None:
            return
        if self.info is not None and self._unsent:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_sent.wait(), flush_seconds)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None

    def submit(self, submit: Submit, stream: SequenceStream, *, request_name: str = "", traceparent: str = "") -> int:
        """Queue a request for the worker and return its rid; its `request_id` is ignored.

        Raises PeerLost without a session, Overloaded if too much is unsent.
        """
        if self.info is None:
            raise PeerLost(f"no session with worker {self.address}")
        if len(self._unsent) >= MAX_UNSENT:
            raise Overloaded(f"worker {self.address} does not take requests")
        message = convert.submit_to_proto(submit, request_name=request_name, traceparent=traceparent)
        rid = message.rid = self._next_rid
        self._next_rid += 1
        self._streams[rid] = stream
        self.dispatched_since_load += 1
        self._send(worker_pb2.SessionRequest(submit=message))
        return rid

    def abort(self, rid: int, *, stop: bool = False) -> None:
        """End a request: with `stop` a stop string matched and its end still comes; else nothing of it comes any more.

        Ids that have ended are ignored.
        """
        if rid not in self._streams:
            return
        if not stop:
            del self._streams[rid]
        reason = convert.ABORT_STOP if stop else ""
        self._send(worker_pb2.SessionRequest(abort=worker_pb2.Abort(rid=rid, reason=reason)))

    def _send(self, message: worker_pb2.SessionRequest) -> None:
        # Aborts are not refused: there is at most one or two for each submit, which is.
        self._unsent.append(message)
        self._all_sent.clear()
        self._has_unsent.set()

    async def _run(self) -> None:
        backoff = RECONNECT_SECONDS_MIN
        try:
            while True:
                async with open_channel(self.address, tls=self._tls) as channel:  # with the certificates of now
                    if not await self._connected(channel):
                        continue
                    error = await self._session(channel)
                if self.info is not None:
                    backoff = RECONNECT_SECONDS_MIN
                else:
                    self._tell_trouble(error.message)
                self._lose(error)
                await asyncio.sleep(backoff * self._jitter())
                backoff = min(backoff * 2, RECONNECT_SECONDS_MAX)
        finally:
            self._lose(PeerLost("this gateway closed its session"), expected=True)

    async def _connected(self, channel: aio.Channel) -> bool:
        """Wait for the connection; False, and a line in the log about why, if it does not come in time."""
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        except TimeoutError:
            self._tell_trouble(await why_not_connected(channel, secure=self._tls is not None))
            return False
        return True

    def _tell_trouble(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            _logger.warning("no session with worker %s: %s", self.address, trouble)
            self._trouble = trouble

    async def _session(self, channel: aio.Channel) -> TandemError:
        """Run one session to its end and return why it ended."""
        call: _Call = worker_grpc.WorkerServiceStub(channel).Session()
        writer: asyncio.Task[None] | None = None
        try:
            hello = worker_pb2.Hello(gateway_id=self._gateway_id, protocol_version=convert_worker.PROTOCOL_VERSION)
            await call.write(worker_pb2.SessionRequest(hello=hello))
            first = await asyncio.wait_for(call.read(), HELLO_SECONDS)
            if not isinstance(first, worker_pb2.SessionResponse) or not first.HasField("info"):
                return PeerLost(f"worker {self.address} did not introduce itself")
            self._accept(first)
            writer = asyncio.create_task(self._write(call), name=f"session writer {self.address}")
            while isinstance(response := await call.read(), worker_pb2.SessionResponse):
                self._accept(response)
            return PeerLost(f"worker {self.address} closed its session")
        except TimeoutError:
            return PeerLost(f"worker {self.address} did not answer Hello within {HELLO_SECONDS:g} s")
        except aio.AioRpcError as error:
            return status.from_rpc_error(error)
        except Exception as error:  # a frame that makes no sense must not take the gateway's other workers with it
            _logger.exception("session with %s: unreadable frame", self.address)
            return PeerLost(f"worker {self.address} sent an unreadable frame: {error}")
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await writer

    async def _write(self, call: _Call) -> None:
        try:
            while True:
                while self._unsent:
                    await call.write(self._unsent.popleft())
                self._all_sent.set()
                self._has_unsent.clear()
                await self._has_unsent.wait()
        except aio.AioRpcError:
            return  # the reader meets the same end and says why

    def _accept(self, response: worker_pb2.SessionResponse) -> None:
        if response.HasField("load"):
            self.load = convert_worker.load_from_proto(response.load)
            self.dispatched_since_load = 0
        for delta in response.deltas:
            stream = self._streams.get(delta.rid)
            if stream is not None and not stream.put(convert.tokens_from_proto(delta)):
                self.abort(delta.rid)
        for end in response.ends:
            ended = convert.ended_from_proto(end)  # may raise: then the stream is still there to be failed
            stream = self._streams.pop(end.rid, None)
            if stream is not None:
                stream.end(ended)
        if response.HasField("info"):
            self.info = convert_worker.worker_info_from_proto(response.info)
            self._trouble = ""
            _logger.info(
                "worker %s: %s %s, model %s",
                self.address,
                self.info.state,
                self.info.loop or self.info.role,
                self.info.model,
            )
            self._on_change()

    def _lose(self, error: TandemError, *, expected: bool = False) -> None:
        streams, self._streams = self._streams, {}
        self._unsent.clear()
        self._all_sent.set()
        self.load = LoadSnapshot()
        self.dispatched_since_load = 0
        if self.info is not None:
            expected = expected or (self.info.state == "draining" and not streams)
            level = logging.DEBUG if expected else logging.WARNING
            _logger.log(level, "worker %s lost with %d requests: %s", self.address, len(streams), error.message)
            self.info = None
            self._on_change()
        for stream in streams.values():
            stream.fail(PeerLost(f"worker {self.address} was lost: {error.message}"))

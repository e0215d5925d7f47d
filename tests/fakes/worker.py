"""A worker without a model: a real WorkerService on a real port whose next token is a function of prompt and index.

It decodes all requests of a session in step, one frame a step, as a worker's loop does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from tandem.core import token_ids
from tandem.core.messages.requests import Ended, EndReason, Submit, Timing, Tokens
from tandem.core.messages.sampling import TokenLogprob
from tandem.core.messages.worker import WorkerInfo
from tandem.core.stats import LoadSnapshot, PageCounts
from tandem.errors import InvalidRequest
from tandem.rpc import convert, convert_worker
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.rpc.gen.worker.v1 import worker_service_pb2_grpc as worker_grpc
from tandem.rpc.server import RpcServer

VOCAB_SIZE = 1000
TokenFunction = Callable[[list[int], int], int]


def hashed_token(prompt: list[int], index: int) -> int:
    """The token of output `index`: depends on the whole prompt, is never 0."""
    state = 2166136261
    for value in (*prompt, index):
        state = (state ^ value) * 16777619 & 0xFFFFFFFF
    return 1 + state % (VOCAB_SIZE - 1)


def scripted(tokens: list[int]) -> TokenFunction:
    """The same output for every prompt; wraps around."""
    return lambda prompt, index: tokens[index % len(tokens)]


@dataclass(slots=True)
class Running:
    submit: Submit
    prompt: list[int]
    deadline: float | None
    emitted: int = 0  # output tokens, those that the request brought along included
    given: int = 0


@dataclass(slots=True)
class FakeSession:
    """One gateway's session as the worker sees it."""

    running: dict[int, Running] = field(default_factory=dict)
    info_due: bool = False
    ends: list[worker_pb2.SequenceEnd] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class FakeWorker(worker_grpc.WorkerServiceServicer):
    """`step_seconds` between frames; `stall_after`: no request gets more output tokens than that."""

    def __init__(
        self,
        role: str = "decode",
        *,
        token: TokenFunction = hashed_token,
        step_seconds: float = 0.0,
        stall_after: int | None = None,
        tokens_per_step: int = 1,
        **info: Any,
    ) -> None:
        self.token = token
        self.step_seconds = step_seconds
        self.stall_after = stall_after
        self.tokens_per_step = tokens_per_step
        self.load = LoadSnapshot(pages=PageCounts(free=100, total=100))
        self.cached_tokens = 1
        self.refusal: Ended | None = None  # how every request ends at once, if set
        self.submits: list[worker_pb2.Submit] = []
        self.aborts: list[tuple[int, str, float]] = []
        self.sessions: list[FakeSession] = []
        self.num_sessions = 0
        self.num_sent = 0  # output tokens
        self.instance_id = os.urandom(16)
        self.address = ""
        self._role = role
        self._info = info
        self._server: RpcServer | None = None
        self._abort_seen = asyncio.Event()
        self._draining = False

    @property
    def info(self) -> WorkerInfo:
        facts: dict[str, Any] = {
            "worker_id": f"fake-{self._role}",
            "instance_id": self.instance_id,
            "role": self._role,
            "state": "ready",
            "model": "m",
            "fingerprint": "f1",
            "handoff_address": self.address if self._role == "prefill" else "",
            "max_context_tokens": 512,
            "max_req_input_len": 500,
            "max_total_num_tokens": 4096,
            "max_running_requests": 256,
            "vocab_size": VOCAB_SIZE,
            "eos_token_ids": (0,),
        }
        draining = {"state": "draining"} if self._draining else {}
        return WorkerInfo(**(facts | self._info | draining))

    @property
    def inflight(self) -> int:
        return sum(len(session.running) for session in self.sessions)

    async def start(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> str:
        self._draining = False
        self._server = RpcServer()
        self._server.add(worker_grpc.add_WorkerServiceServicer_to_server, self, "tandem.worker.v1.WorkerService")
        self.address = f"127.0.0.1:{self._server.listen('127.0.0.1', port, credentials)}"
        await self._server.start()
        await self._server.set_ready(True)
        return self.address

    async def kill(self) -> None:
        """Cut every session now."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def restart(self) -> None:
        """Come back at the same address as another life."""
        self.instance_id = os.urandom(16)
        await self.start(int(self.address.rpartition(":")[2]))

    def drain(self) -> None:
        """Say so, take no more, and hand back everything at once."""
        self._draining = True
        for session in self.sessions:
            session.info_due = True
            for rid, running in session.running.items():
                session.ends.append(self._end(rid, running, EndReason.DRAINED))
            session.running.clear()
            session.wake.set()

    async def aborted(self) -> tuple[int, str, float]:
        """Wait for the next Abort."""
        while not self.aborts:
            self._abort_seen.clear()
            await asyncio.wait_for(self._abort_seen.wait(), 30)
        return self.aborts.pop(0)

    # ---- service ----

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.SessionResponse]:
        hello = await anext(aiter(request_iterator))
        assert hello.HasField("hello")
        session = FakeSession()
        self.sessions.append(session)
        self.num_sessions += 1
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            load = convert_worker.load_to_proto(self.load, sequence=0, mono_ns=time.monotonic_ns())
            yield worker_pb2.SessionResponse(info=convert_worker.worker_info_to_proto(self.info), load=load)
            step = 0
            while True:
                frame = self._step(session)
                if frame is None:
                    session.wake.clear()
                    await session.wake.wait()
                    continue
                step += 1
                frame.step = step
                yield frame
                await asyncio.sleep(self.step_seconds)
        finally:
            self.sessions.remove(session)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.GenerateResponse]:
        raise InvalidRequest("not in this fake")
        yield

    async def GetWorkerInfo(self, request: Any, context: Any) -> worker_pb2.GetWorkerInfoResponse:
        return worker_pb2.GetWorkerInfoResponse(info=convert_worker.worker_info_to_proto(self.info))

    async def WatchKvEvents(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.WatchKvEventsResponse]:
        raise InvalidRequest("not in this fake")
        yield

    async def _read(self, session: FakeSession, requests: Any) -> None:
        async for request in requests:
            if request.HasField("submit"):
                self._submit(session, request.submit)
            elif request.HasField("abort"):
                self._abort(session, request.abort)
            session.wake.set()

    def _submit(self, session: FakeSession, message: worker_pb2.Submit) -> None:
        self.submits.append(message)
        try:
            submit = convert.submit_from_proto(message)
        except InvalidRequest as error:
            session.ends.append(convert.ended_to_proto(convert.ended_from_error(message.rid, error)))
            return
        if self.refusal is not None:
            session.ends.append(convert.ended_to_proto(self.refusal, message.rid))
            return
        if self._draining:
            session.ends.append(convert.ended_to_proto(Ended(request_id=message.rid, reason=EndReason.DRAINED)))
            return
        timeout, outputs = submit.timeout_seconds, token_ids.unpack(submit.output_token_ids)
        running = Running(
            submit,
            token_ids.unpack(submit.prompt_token_ids),
            None if timeout is None else time.monotonic() + timeout,
            emitted=len(outputs),
            given=len(outputs),
        )
        params = submit.sampling
        last = outputs[-1] if len(outputs) > params.min_tokens else None
        if last is not None and (last in params.stop_token_ids or (last == 0 and not params.ignore_eos)):
            session.ends.append(self._end(message.rid, running, EndReason.STOP, last))
        elif outputs and len(outputs) >= params.max_tokens:
            session.ends.append(self._end(message.rid, running, EndReason.LENGTH))
        else:
            session.running[message.rid] = running

    def _abort(self, session: FakeSession, message: worker_pb2.Abort) -> None:
        self.aborts.append((message.rid, message.reason, time.monotonic()))
        self._abort_seen.set()
        running = session.running.pop(message.rid, None)
        if running is not None:
            reason = EndReason.STOP if message.reason == convert.ABORT_STOP else EndReason.CANCELLED
            session.ends.append(self._end(message.rid, running, reason))

    def _step(self, session: FakeSession) -> worker_pb2.SessionResponse | None:
        """One token for everybody; None if there is nothing to say."""
        frame = worker_pb2.SessionResponse()
        if session.info_due:
            session.info_due = False
            frame.info.CopyFrom(convert_worker.worker_info_to_proto(self.info))
        frame.ends.extend(session.ends)
        session.ends.clear()
        for rid, running in list(session.running.items()):
            self._advance(session, frame, rid, running)
        return frame if frame.deltas or frame.ends or frame.HasField("info") else None

    def _advance(self, session: FakeSession, frame: worker_pb2.SessionResponse, rid: int, running: Running) -> None:
        params = running.submit.sampling
        if running.deadline is not None and time.monotonic() > running.deadline:
            frame.ends.append(self._end(rid, session.running.pop(rid), EndReason.DEADLINE))
            return
        if self.stall_after is not None and running.emitted >= self.stall_after:
            return
        count = min(self.tokens_per_step, params.max_tokens - running.emitted)
        tokens = [self.token(running.prompt, running.emitted + i) for i in range(count)]
        stop: int | None = None
        for i, token in enumerate(tokens):
            if token in params.stop_token_ids or (token == 0 and not params.ignore_eos):
                tokens, stop = tokens[: i + 1], token
                break
        if tokens:
            frame.deltas.append(convert.tokens_to_proto(self._tokens(rid, running, tokens)))
        running.emitted += len(tokens)
        self.num_sent += len(tokens)
        if stop is not None:
            frame.ends.append(self._end(rid, session.running.pop(rid), EndReason.STOP, stop))
        elif running.emitted >= params.max_tokens:
            frame.ends.append(self._end(rid, session.running.pop(rid), EndReason.LENGTH))

    def _tokens(self, rid: int, running: Running, tokens: list[int]) -> Tokens:
        params = running.submit.sampling
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            logprobs = tuple(
                TokenLogprob(t, -0.5, tuple((i, -1.0 - i) for i in range(params.logprobs))) for t in tokens
            )
        prompt = prompt_logprobs(running) if running.emitted == 0 else ()
        return Tokens(rid, running.emitted, tuple(tokens), logprobs, prompt)

    def _end(self, rid: int, running: Running, reason: EndReason, stop: int | None = None) -> worker_pb2.SequenceEnd:
        peer = running.submit.peers[0].address if running.submit.peers else ""
        return convert.ended_to_proto(
            Ended(
                request_id=rid,
                reason=reason,
                stop_token_id=stop,
                prompt_tokens=len(running.prompt),
                completion_tokens=running.emitted,
                cached_tokens=self.cached_tokens,
                prompt_logprobs=prompt_logprobs(running) if not running.emitted else (),
                timing=Timing(prefill_seconds=0.25, transfer_bytes=4096, transport="tcp", prefill_worker=peer),
            )
        )


def prompt_logprobs(running: Running) -> tuple[TokenLogprob, ...]:
    """A log-probability for each prompt token, if they were asked for."""
    if running.submit.sampling.prompt_logprobs is None:
        return ()
    return tuple(TokenLogprob(token, None if i == 0 else -float(i)) for i, token in enumerate(running.prompt))

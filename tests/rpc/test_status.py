"""The error tree on the wire: codes, details, and back; over a real server through the interceptor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import uvloop
from google.rpc import status_pb2
from grpc import aio

from tandem import errors
from tandem.rpc import status
from tandem.rpc.server import RpcServer

TREE: list[tuple[errors.TandemError, grpc.StatusCode]] = [
    (errors.InvalidRequest("bad", field="sampling.n"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidRequest("bad", reason="UNSUPPORTED"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound("who", field="model"), grpc.StatusCode.NOT_FOUND),
    (errors.Unauthenticated("who"), grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied("no"), grpc.StatusCode.PERMISSION_DENIED),
    (errors.Overloaded("full", retry_after_seconds=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.NoWorker("none"), grpc.StatusCode.UNAVAILABLE),
    (errors.Draining("later"), grpc.StatusCode.UNAVAILABLE),
    (errors.PeerLost("gone"), grpc.StatusCode.UNAVAILABLE),
    (errors.PeerLost("gone", tokens_delivered=True), grpc.StatusCode.ABORTED),
    (errors.Draining("later", tokens_delivered=True), grpc.StatusCode.ABORTED),
    (errors.HandoffFailed("kv"), grpc.StatusCode.INTERNAL),
    (errors.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Cancelled("left"), grpc.StatusCode.CANCELLED),
    (errors.TandemError("bug"), grpc.StatusCode.INTERNAL),
]


@pytest.mark.parametrize(("error", "code"), TREE, ids=lambda value: getattr(value, "reason", None))
def test_round_trip(error: errors.TandemError, code: grpc.StatusCode) -> None:
    assert status.code_of(error) is code
    back = status.from_status(status_pb2.Status.FromString(status.to_status(error).SerializeToString()))
    assert type(back) is type(error)
    assert (back.message, back.reason) == (error.message, error.reason)
    assert getattr(back, "field", "") == getattr(error, "field", "")
    assert getattr(back, "tokens_delivered", None) == getattr(error, "tokens_delivered", None)
    if code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
        assert back.retry_after_seconds == (error.retry_after_seconds or status.DEFAULT_RETRY_SECONDS)


def test_statuses_of_others() -> None:
    assert type(status.from_status(status_pb2.Status(code=14))) is errors.Unavailable
    assert type(status.from_status(status_pb2.Status(code=3, message="m"))) is errors.InvalidRequest
    unknown = status.from_status(status_pb2.Status(code=99))
    assert (type(unknown), unknown.message) == (errors.TandemError, "UNKNOWN")
    # A reason does not turn a status into something that its code is not.
    lost = status.to_status(errors.PeerLost("x"))
    lost.code = 3
    assert type(status.from_status(lost)) is errors.InvalidRequest


def test_broken_details_are_skipped() -> None:
    broken = status.to_status(errors.NoWorker("x"))
    broken.details[0].value = b"\xff\xff"
    error = status.from_status(broken)
    assert (type(error), error.retry_after_seconds) == (errors.Unavailable, 1.0)


def test_long_messages_fit_into_headers() -> None:
    assert len(status.to_status(errors.InvalidRequest("x" * 10**6, field="f")).SerializeToString()) < 8192


class Raising:
    """One method of every kind; what it raises is the request."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def unary(self, request: bytes, context: Any) -> bytes:
        raise raised(request)

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            if request == b"wait":
                await asyncio.sleep(60)
            raise raised(request)
        finally:
            self.closed.set()

    async def writer(self, request: bytes, context: Any) -> None:
        await context.write(b"first")
        raise raised(request)

    async def aborter(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "own words")
        raise AssertionError

    async def duplex(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield b"first"
            raise raised(request)


def raised(request: bytes) -> Exception:
    return errors.PeerLost("gone") if request == b"lost" else RuntimeError("secret of ours")


def add_raising(servicer: Raising, server: aio.Server) -> None:
    handlers: dict[str, Any] = {
        "unary": grpc.unary_unary_rpc_method_handler(servicer.unary),
        "stream": grpc.unary_stream_rpc_method_handler(servicer.stream),
        "writer": grpc.unary_stream_rpc_method_handler(servicer.writer),
        "aborter": grpc.unary_unary_rpc_method_handler(servicer.aborter),
        "duplex": grpc.stream_stream_rpc_method_handler(servicer.duplex),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Raising", handlers),))


async def ending(call: Any) -> tuple[list[bytes], aio.AioRpcError]:
    messages: list[bytes] = []
    try:
        if hasattr(call, "__aiter__"):
            async for message in call:
                messages.append(message)
        else:
            await call
    except aio.AioRpcError as error:
        return messages, error
    raise AssertionError("the call did not fail")


def test_the_interceptor_ends_calls_of_every_kind(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        server, servicer = RpcServer(), Raising()
        server.add(add_raising, servicer, "test.Raising")
        channel: Any = aio.insecure_channel(f"127.0.0.1:{server.listen('127.0.0.1', 0)}")
        await server.start()
        unary, stream = channel.unary_unary("/test.Raising/unary"), channel.unary_stream("/test.Raising/stream")
        writer, aborter = channel.unary_stream("/test.Raising/writer"), channel.unary_unary("/test.Raising/aborter")
        duplex = channel.stream_stream("/test.Raising/duplex")
        for call, expected in (
            (unary(b"lost"), []),
            (stream(b"lost"), [b"first"]),
            (writer(b"lost"), [b"first"]),
            (duplex(iter([b"lost"])), [b"first"]),
        ):
            messages, error = await ending(call)
            assert messages == expected
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert isinstance(status.from_rpc_error(error), errors.PeerLost)
        for bug in (unary(b""), stream(b"")):
            _, error = await ending(bug)
            assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
        _, error = await ending(aborter(b""))
        assert (error.code(), error.details()) == (grpc.StatusCode.ALREADY_EXISTS, "own words")
        servicer.closed.clear()
        waiting = stream(b"wait")
        await waiting.read()
        waiting.cancel()
        await asyncio.wait_for(servicer.closed.wait(), 30)
        await channel.close()
        await server.stop(None)

    uvloop.run(scenario())
    bugs = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(bugs) == 2
    assert all(record.exc_info for record in bugs)

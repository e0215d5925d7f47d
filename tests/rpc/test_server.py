"""The server builder: ports, health through a life, limits, and what a client channel must tolerate."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
import uvloop
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import ConfigError
from tandem.rpc.channels import open_channel
from tandem.rpc.options import client_options, server_options
from tandem.rpc.server import RpcServer

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def add_echo(servicer: object, server: aio.Server) -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    handlers: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))


async def status_of(channel: aio.Channel, name: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=name))).status)


def test_health_through_a_life() -> None:
    async def scenario() -> None:
        server = RpcServer()
        server.add(add_echo, None, "test.Echo")
        port = server.listen("127.0.0.1", 0)
        await server.start()
        channel = open_channel(f"127.0.0.1:{port}")

        async def all_are(expected: int) -> None:
            for name in ("", "readiness", "test.Echo"):
                assert await status_of(channel, name) == expected
            assert await status_of(channel, "liveness") == SERVING

        await all_are(NOT_SERVING)
        await server.set_ready(True)
        await all_are(SERVING)
        await server.set_ready(False)
        await all_are(NOT_SERVING)
        await server.set_ready(True)
        await server.drain()
        await all_are(NOT_SERVING)
        await server.set_ready(True)
        await all_are(NOT_SERVING)
        assert not server.ready
        with pytest.raises(aio.AioRpcError) as caught:
            await status_of(channel, "no.such")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await channel.close()
        await server.stop(None)

    uvloop.run(scenario())


def test_a_port_is_not_shared_silently() -> None:
    async def scenario() -> None:
        first, second = RpcServer(), RpcServer()
        port = first.listen("127.0.0.1", 0)
        await first.start()
        with pytest.raises(ConfigError, match=str(port)):
            second.listen("127.0.0.1", port)
        await first.stop(None)

    uvloop.run(scenario())


def test_messages_up_to_the_limit_pass() -> None:
    async def scenario() -> None:
        server = RpcServer(max_message_bytes=9 << 20)
        server.add(add_echo, None, "test.Echo")
        port = server.listen("127.0.0.1", 0)
        await server.start()
        channel: Any = open_channel(f"127.0.0.1:{port}", max_message_bytes=16 << 20)
        echo = channel.unary_unary("/test.Echo/Echo")
        assert len(await echo(b"x" * (8 << 20))) == 8 << 20
        with pytest.raises(aio.AioRpcError) as caught:
            await echo(b"x" * (10 << 20))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await channel.close()
        await server.stop(None)

    uvloop.run(scenario())


def test_clients_do_not_ping_faster_than_servers_allow() -> None:
    client = dict(client_options(1))
    server = dict(server_options(1, share_port=True, max_connection_age_seconds=60))
    assert int(client["grpc.keepalive_time_ms"]) >= int(server["grpc.http2.min_recv_ping_interval_without_data_ms"])
    assert server["grpc.keepalive_permit_without_calls"] == client["grpc.keepalive_permit_without_calls"] == 1
    assert server["grpc.so_reuseport"] == 1
    assert server["grpc.max_connection_age_ms"] == 60_000
    assert "grpc.max_connection_age_ms" not in dict(
        server_options(1, share_port=False, max_connection_age_seconds=None)
    )

"""gRPC over TLS: who gets in, in which words others are refused, and a change of certificates under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.certificates import CertificateSource, Pem, between_pods, client_facing
from tandem.config import TlsConfig
from tandem.rpc.channels import open_channel, why_not_connected
from tandem.rpc.server import RpcServer
from tandem.rpc.tls import ClientTls, PeerCheck, server_credentials
from tests.certificates import PEER_NAME, Authority


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a reason waits for it."""
    monkeypatch.setattr("tandem.rpc.channels._ASK_SECONDS", 20.0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@dataclass
class Pod:
    source: CertificateSource
    address: str


@contextlib.asynccontextmanager
async def pod(tls: TlsConfig) -> AsyncIterator[Pod]:
    source = between_pods(tls)
    assert source is not None
    server = RpcServer(admit=PeerCheck(source.files.peer_name))
    port = server.listen("127.0.0.1", 0, server_credentials(source, require_client=True))
    await server.start()
    try:
        yield Pod(source, f"127.0.0.1:{port}")
    finally:
        await server.stop(0)


async def ask(channel: aio.Channel) -> str:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
    except aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "OK"


def shows(authority: Authority, *names: str, ca: bytes | None = None) -> ClientTls:
    chain, key = authority.issue(*names)
    pem = Pem(chain, key, ca or authority.ca)
    return ClientTls(lambda: pem, PEER_NAME)


def test_a_pod_is_served(authority: Authority) -> None:
    async def run() -> None:
        async with (
            pod(authority.pod()) as server,
            open_channel(server.address, tls=ClientTls.between_pods(server.source)) as channel,
        ):
            assert await ask(channel) == "OK"
            assert await why_not_connected(channel, secure=True) == ""

    asyncio.run(run())


def test_strangers_are_refused_in_words(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")

    async def run() -> None:
        async with pod(authority.pod()) as server:

            async def meet(tls: ClientTls | None) -> tuple[str, str]:
                async with open_channel(server.address, tls=tls) as channel:
                    return await ask(channel), await why_not_connected(channel, secure=tls is not None)

            answer, reason = await meet(None)
            assert answer.startswith("UNAVAILABLE")
            assert reason == "it closes the connection: it may want TLS"
            for tls in (
                ClientTls(lambda: Pem(authorities=authority.ca), PEER_NAME),
                shows(other, PEER_NAME, ca=authority.ca),
            ):
                answer, reason = await meet(tls)
                assert answer.startswith("UNAVAILABLE")
                assert reason.startswith("it closes the connection: it wants a certificate that it trusts")
            answer, reason = await meet(shows(authority, PEER_NAME, ca=other.ca))
            assert answer.startswith("UNAVAILABLE")
            assert "not from the authorities" in reason
            answer, _ = await meet(shows(authority, "somebody", "else"))
            assert answer == "PERMISSION_DENIED: your certificate is for somebody, else, not for tandem"
            assert (await meet(ClientTls.between_pods(server.source)))[0] == "OK"

    asyncio.run(run())


def test_a_server_with_another_name_is_not_talked_to(authority: Authority) -> None:
    async def run() -> None:
        async with pod(authority.pod()) as server:
            tls = ClientTls(lambda: server.source.current, "another")
            async with open_channel(server.address, tls=tls) as channel:
                assert (await ask(channel)).startswith("UNAVAILABLE")
                assert await why_not_connected(channel, secure=True) == "its certificate is for another name"

    asyncio.run(run())


def test_tls_to_a_server_without(authority: Authority) -> None:
    async def run() -> None:
        server = RpcServer()
        port = server.listen("127.0.0.1", 0)
        await server.start()
        async with open_channel(f"127.0.0.1:{port}", tls=shows(authority, PEER_NAME)) as channel:
            assert (await ask(channel)).startswith("UNAVAILABLE")
            assert "does not speak TLS" in await why_not_connected(channel, secure=True)
        await server.stop(0)

    asyncio.run(run())


def test_a_change_reaches_new_connections_and_spares_running_ones(authority: Authority, tmp_path: Path) -> None:
    async def run() -> None:
        tls = authority.pod()
        async with pod(tls) as server:
            client = ClientTls.between_pods(server.source)
            before = client.credentials()
            assert client.credentials() is before
            async with open_channel(server.address, tls=client) as running:
                assert await ask(running) == "OK"
                successor = Authority(tmp_path / "successor")  # everything changes, authority included
                chain, key = successor.issue(PEER_NAME)
                Path(tls.peer_certificate_file).write_bytes(chain)
                Path(tls.peer_key_file).write_bytes(key)
                Path(tls.peer_ca_file).write_bytes(successor.ca)
                server.source.look()
                assert await ask(running) == "OK"
                async with open_channel(server.address, tls=client) as channel:
                    assert await ask(channel) == "OK"
                assert client.credentials() is not before
                async with open_channel(server.address, tls=shows(authority, PEER_NAME)) as channel:
                    assert (await ask(channel)).startswith("UNAVAILABLE")

    asyncio.run(run())


@contextlib.contextmanager
def gateway(tls: TlsConfig) -> Iterator[tuple[asyncio.Runner, str]]:
    source = client_facing(tls)
    assert source is not None
    with asyncio.Runner() as runner:

        async def start() -> tuple[RpcServer, int]:
            server = RpcServer()
            port = server.listen("127.0.0.1", 0, server_credentials(source, require_client=bool(tls.client_ca_file)))
            await server.start()
            return server, port

        server, port = runner.run(start())
        yield runner, f"127.0.0.1:{port}"
        runner.run(server.stop(0))


def test_clients_need_a_certificate_only_where_that_is_asked_for(authority: Authority, tmp_path: Path) -> None:
    clients = Authority(tmp_path / "clients")
    chain, key = clients.issue("somebody")

    async def meet(address: str, pem: Pem) -> str:
        async with open_channel(address, tls=ClientTls(lambda: pem)) as channel:
            return await ask(channel)

    with gateway(authority.gateway()) as (runner, address):
        assert runner.run(meet(address, Pem(authorities=authority.ca))) == "OK"
        assert runner.run(meet(address, Pem(authorities=clients.ca))).startswith("UNAVAILABLE")
        assert runner.run(meet(address, Pem())).startswith("UNAVAILABLE")  # public authorities do not know it

    with gateway(replace(authority.gateway(), client_ca_file=str(clients.ca_file))) as (runner, address):
        assert runner.run(meet(address, Pem(chain, key, authority.ca))) == "OK"
        assert runner.run(meet(address, Pem(authorities=authority.ca))).startswith("UNAVAILABLE")
        own_chain, own_key = authority.issue("client")
        assert runner.run(meet(address, Pem(own_chain, own_key, authority.ca))).startswith("UNAVAILABLE")

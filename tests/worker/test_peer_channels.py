"""Channels to prefill workers when certificates change: new hand-offs get the new ones, running ones stay."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from tandem.errors import Unavailable
from tandem.rpc.tls import ClientTls
from tandem.worker.peer_channels import PeerChannels
from tests.certificates import PEER_NAME, Authority
from tests.rpc.test_tls import ask, pod


def test_a_change_of_certificates_makes_a_new_channel(tmp_path: Path) -> None:
    async def run() -> None:
        authority = Authority(tmp_path)
        async with pod(authority.pod()) as server:
            channels = PeerChannels(5.0, idle_seconds=0.05, tls=ClientTls.between_pods(server.source))
            async with channels.connected(server.address) as before:
                async with channels.connected(server.address) as same:
                    assert same is before
                authority.write("pod", PEER_NAME)
                server.source.look()
                async with channels.connected(server.address) as after:
                    assert after is not before
                    assert await ask(after) == "OK"
                    assert await ask(before) == "OK"  # who had it keeps it
                assert len(channels) == 1
            assert before.get_state() is not grpc.ChannelConnectivity.READY or await closed(before)
            async with channels.connected(server.address) as idle:
                authority.write("pod", PEER_NAME)
                server.source.look()
            async with channels.connected(server.address) as anew:  # one that nobody uses goes as well
                assert anew is not idle
            await channels.close()
            assert len(channels) == 0

    asyncio.run(run())


async def closed(channel: grpc.aio.Channel) -> bool:
    async with asyncio.timeout(5):
        while channel.get_state() is not grpc.ChannelConnectivity.SHUTDOWN:
            await asyncio.sleep(0.01)
    return True


def test_a_peer_that_refuses_us_is_named_with_the_reason(tmp_path: Path) -> None:
    async def run() -> None:
        async with pod(Authority(tmp_path / "a").pod()) as server:
            channels = PeerChannels(5.0)
            with pytest.raises(Unavailable, match=r"cannot be reached: it closes the connection: it may want TLS"):
                async with channels.connected(server.address):
                    pass
            await channels.close()

    asyncio.run(run())

"""The two ends of a hand-off stream over real gRPC: what each scheduler is told, whatever way a stream ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import textwrap
from typing import Any

import grpc
import pytest
from grpc import aio

from tandem.core.messages.handoff import (
    Announce,
    Complete,
    DropStream,
    EndCode,
    EndStream,
    FirstToken,
    OpenReceived,
    RankPages,
    ReleaseReason,
    ReleaseReceived,
    SendAccepted,
    SendAnnounce,
    SendComplete,
    SendFirstToken,
    SendRelease,
    StreamAccepted,
    StreamAnnounced,
    StreamClosed,
    StreamCompleted,
    StreamFirstToken,
    StreamLost,
)
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.core.token_ids import pack
from tandem.rpc.gen.handoff.v1 import handoff_service_pb2 as handoff_pb2
from tandem.rpc.gen.handoff.v1.handoff_service_pb2_grpc import HandoffServiceStub
from tandem.rpc.handoff_wire import open_to_proto, release_to_proto
from tests.worker.streams import VOCAB_SIZE, Pair, an_accepted, an_open, running_pair


def test_a_whole_hand_off() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            opened = an_open(timeout_seconds=30.0, sampling=SamplingParams(seed=5, stop_token_ids=(7,)))
            mine = pair.open(opened)
            received = await pair.prefill.next(OpenReceived)
            assert received.open.timeout_seconds is not None and 20 < received.open.timeout_seconds < 31
            assert received.open.sampling == opened.sampling
            theirs = received.stream_id
            announce = Announce(0, 3, (RankPages(bytes(8), b""),))
            first = FirstToken(token_id=9, logprob=TokenLogprob(9, -0.5), cached_tokens=2)
            for effect in (
                SendAccepted(theirs, an_accepted()),
                SendAnnounce(theirs, announce),
                SendFirstToken(theirs, first),
                SendComplete(theirs, Complete(prefill_seconds=0.25)),
            ):
                pair.server.respond(effect)
            assert (await pair.decode.next(StreamAccepted)).accepted == an_accepted()
            assert await pair.decode.next(StreamAnnounced) == StreamAnnounced(mine, announce)
            assert await pair.decode.next(StreamFirstToken) == StreamFirstToken(mine, first)
            assert (await pair.decode.next(StreamCompleted)).complete.prefill_seconds == 0.25
            pair.client.release(SendRelease(mine, ReleaseReason.DONE))
            assert await pair.prefill.next(ReleaseReceived) == ReleaseReceived(theirs, ReleaseReason.DONE)
            pair.server.end(EndStream(theirs, EndCode.OK))
            await pair.decode.nothing()
            await pair.prefill.nothing(0)
            assert pair.client.num_streams == 0 and pair.server.num_streams == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("reason", list(ReleaseReason))
def test_a_release_says_why(reason: ReleaseReason) -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            mine, theirs = await pair.opened()
            pair.client.release(SendRelease(mine, reason))
            assert (await pair.prefill.next(ReleaseReceived)).reason is reason
            pair.server.end(EndStream(theirs, EndCode.OK))
            await pair.prefill.nothing()

    asyncio.run(scenario())


def test_a_dropped_stream_is_lost_not_released() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            mine, theirs = await pair.opened()
            pair.client.drop(DropStream(mine))
            assert await pair.prefill.next(StreamLost) == StreamLost(theirs)
            await pair.decode.nothing()
            await pair.prefill.nothing(0)
            assert pair.server.num_streams == 0

    asyncio.run(scenario())


async def raw_call(pair: Pair, *messages: handoff_pb2.HandoffRequest) -> tuple[aio.Channel, Any]:
    channel = aio.insecure_channel(pair.address)
    call = HandoffServiceStub(channel).Handoff()
    for message in messages:
        await call.write(message)
    return channel, call


@pytest.mark.parametrize("how", ["half-close", "cancel", "connection"])
def test_every_end_without_a_release_is_a_loss(how: str) -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            channel, call = await raw_call(pair, open_to_proto(an_open()))
            theirs = (await pair.prefill.next(OpenReceived)).stream_id
            match how:
                case "half-close":
                    await call.done_writing()
                    assert await call.code() is grpc.StatusCode.INTERNAL
                case "cancel":
                    call.cancel()
                case "connection":
                    await channel.close()
            assert await pair.prefill.next(StreamLost) == StreamLost(theirs)
            await pair.prefill.nothing()
            await channel.close()

    asyncio.run(scenario())


def test_a_release_followed_by_a_half_close_is_only_a_release() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            channel, call = await raw_call(pair, open_to_proto(an_open()), release_to_proto(ReleaseReason.DONE))
            await call.done_writing()
            theirs = (await pair.prefill.next(OpenReceived)).stream_id
            await pair.prefill.next(ReleaseReceived)
            await pair.prefill.nothing()
            pair.server.end(EndStream(theirs, EndCode.OK))
            assert await call.code() is grpc.StatusCode.OK
            await channel.close()

    asyncio.run(scenario())


def test_a_killed_importer_is_a_loss() -> None:
    script = textwrap.dedent(
        """
        import asyncio, sys
        from tests.worker.streams import *
        async def main():
            client = HandoffClient(print, PeerChannels(5.0))
            client.open(OpenStream(1, sys.argv[1], PREFILL_ID, an_open()))
            await asyncio.sleep(60)
        asyncio.run(main())
        """
    )

    async def scenario() -> None:
        async with running_pair() as pair:
            importer = await asyncio.create_subprocess_exec(sys.executable, "-c", script, pair.address)
            theirs = (await pair.prefill.next(OpenReceived, 30.0)).stream_id
            importer.send_signal(signal.SIGKILL)
            assert await pair.prefill.next(StreamLost) == StreamLost(theirs)
            await importer.wait()

    asyncio.run(scenario())


@pytest.mark.parametrize("code", [code for code in EndCode if code is not EndCode.OK])
def test_the_exporter_ends_with_a_code(code: EndCode) -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            mine, theirs = await pair.opened()
            pair.server.end(EndStream(theirs, code, "because"))
            closed = await pair.decode.next(StreamClosed)
            assert closed == StreamClosed(mine, code, "because")
            await pair.prefill.nothing()

    asyncio.run(scenario())


def test_an_end_before_the_release_is_no_success() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            _, theirs = await pair.opened()
            pair.server.end(EndStream(theirs, EndCode.OK))
            assert (await pair.decode.next(StreamClosed)).code is EndCode.LOST

    asyncio.run(scenario())


def test_another_life_of_the_worker_is_not_the_one_that_was_meant() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            pair.open(instance_id=b"x" * 16)
            closed = await pair.decode.next(StreamClosed)
            assert closed.code is EndCode.LOST and "was meant" in closed.message
            await pair.prefill.nothing(0)

    asyncio.run(scenario())


def test_a_draining_worker_refuses() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            pair.server.drain()
            pair.open()
            assert (await pair.decode.next(StreamClosed)).code is EndCode.DRAINING

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": pack([VOCAB_SIZE])},
        {"prompt_token_ids": pack([1] * 64)},
        {"prompt_token_ids": b""},
        {"handoff_id": b"short"},
        {"sampling": SamplingParams(temperature=-1.0)},
        {"sampling": SamplingParams(stop_token_ids=(VOCAB_SIZE,))},
    ],
)
def test_an_open_at_fault_is_invalid_and_never_reaches_the_rank(changes: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            pair.open(an_open(**changes))
            assert (await pair.decode.next(StreamClosed)).code is EndCode.INVALID
            await pair.prefill.nothing(0)
            await pair.opened()  # and the server goes on

    asyncio.run(scenario())


def test_messages_out_of_order_are_faults() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            channel, call = await raw_call(pair, release_to_proto(ReleaseReason.DONE))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            await pair.prefill.nothing(0)
            second, call = await raw_call(pair, open_to_proto(an_open()), open_to_proto(an_open()))
            theirs = (await pair.prefill.next(OpenReceived)).stream_id
            assert await pair.prefill.next(StreamLost) == StreamLost(theirs)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            await channel.close()
            await second.close()

    asyncio.run(scenario())


def test_an_unreachable_peer_is_told_quickly_and_harms_nobody() -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
            async with running_pair(connect_seconds=60.0) as pair:
                refused = pair.open(address=f"127.0.0.1:{taken.getsockname()[1]}")
                closed = await pair.decode.next(StreamClosed, 20.0)
                assert (closed.stream_id, closed.code) == (refused, EndCode.LOST)
                await pair.opened()

    asyncio.run(scenario())


def test_a_silent_peer_is_given_up_after_connect_seconds() -> None:
    async def scenario() -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()  # accepts, and never says a word of HTTP/2
            async with running_pair(connect_seconds=8.0) as pair:
                pair.open(address=f"127.0.0.1:{silent.getsockname()[1]}")
                mine, _ = await pair.opened()  # nothing has been heard of the silent one
                closed = await pair.decode.next(StreamClosed)
                assert closed.code is EndCode.LOST and closed.stream_id != mine
                assert "within 8 s" in closed.message
                assert len(pair.channels) == 1

    asyncio.run(scenario())


def test_a_release_before_the_connection_is_there_needs_no_peer() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            mine = pair.open()
            pair.client.release(SendRelease(mine, ReleaseReason.ABANDONED))
            await pair.decode.nothing()
            await pair.prefill.nothing(0)
            assert pair.client.num_streams == 0

    asyncio.run(scenario())


def test_the_deadline_ends_both_sides() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            mine = pair.open(an_open(timeout_seconds=3.0))
            theirs = (await pair.prefill.next(OpenReceived)).stream_id
            assert (await pair.decode.next(StreamClosed)).code is EndCode.DEADLINE
            assert await pair.prefill.next(StreamLost) == StreamLost(theirs)
            assert mine == 1

    asyncio.run(scenario())


def test_channels_are_shared_and_closed_when_idle() -> None:
    async def scenario() -> None:
        async with running_pair() as pair:
            pair.channels._idle_seconds = 0.1
            ends = [await pair.opened() for _ in range(5)]
            assert len(pair.channels) == 1
            for mine, theirs in ends:
                pair.client.release(SendRelease(mine, ReleaseReason.DONE))
                await pair.prefill.next(ReleaseReceived)
                pair.server.end(EndStream(theirs, EndCode.OK))
            async with asyncio.timeout(30.0):
                while len(pair.channels):
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())


def test_an_importer_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.worker.handoff_server.MAX_UNREAD_RESPONSES", 50)

    async def scenario() -> None:
        async with running_pair() as pair:
            _, theirs = await pair.opened()
            announce = Announce(0, 1, (RankPages(bytes(8), b""),))
            for _ in range(60):  # faster than any stream can take them
                pair.server.respond(SendAnnounce(theirs, announce))
            assert await pair.prefill.next(StreamLost) == StreamLost(theirs)
            assert (await pair.decode.next(StreamClosed)).code is EndCode.LOST

    asyncio.run(scenario())

"""The gateway's side of a session, before a real server: one stream, many requests, bounds, loss and return."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tandem.certificates import between_pods
from tandem.core import token_ids
from tandem.core.messages.requests import EndReason, Submit, Tokens
from tandem.core.messages.sampling import SamplingParams
from tandem.core.stats import LoadSnapshot, PageCounts
from tandem.errors import Overloaded, PeerLost
from tandem.rpc import convert, session_client
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.rpc.sequence_stream import SequenceStream
from tandem.rpc.session_client import SessionClient
from tandem.rpc.tls import ClientTls, server_credentials
from tests.certificates import PEER_NAME, Authority
from tests.fakes.worker import FakeWorker, hashed_token

Scenario = Callable[[FakeWorker, SessionClient], Awaitable[None]]


def run(scenario: Scenario, worker_class: type[FakeWorker] = FakeWorker, **options: Any) -> None:
    async def main() -> None:
        worker = worker_class(**options)
        client = SessionClient(await worker.start(), gateway_id="g", on_change=lambda: None, jitter=lambda: 0.1)
        client.start()
        try:
            await asyncio.wait_for(scenario(worker, client), 120)
        finally:
            await client.close()
            await worker.kill()

    uvloop.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def connected(client: SessionClient) -> None:
    await until(lambda: client.info is not None)


class Reader:
    """Submits one request and gathers what comes."""

    def __init__(self, client: SessionClient, prompt: list[int], max_tokens: int, bound: int = 1000) -> None:
        self.wakeup = asyncio.Event()
        self.stream = SequenceStream(bound, self.wakeup.set)
        submit = Submit(
            request_id=0,
            prompt_token_ids=token_ids.pack(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        self.rid = client.submit(submit, self.stream)
        self.got: list[int] = []

    async def all(self) -> list[int]:
        while self.stream.ended is None and self.stream.error is None:
            await self.wakeup.wait()
            self.wakeup.clear()
            for tokens in self.stream.take():
                assert tokens.first_index == len(self.got)
                self.got.extend(tokens.token_ids)
        for tokens in self.stream.take():
            self.got.extend(tokens.token_ids)
        return self.got


def test_many_requests_share_the_stream() -> None:
    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await connected(client)
        readers = [Reader(client, [n, 1], 1 + n % 7) for n in range(100)]
        assert client.inflight == 100
        for n, tokens in enumerate(await asyncio.gather(*(reader.all() for reader in readers))):
            assert tokens == [hashed_token([n, 1], i) for i in range(1 + n % 7)]
        assert all(r.stream.ended is not None and r.stream.ended.reason is EndReason.LENGTH for r in readers)
        assert client.inflight == 0
        assert worker.num_sessions == 1

    run(scenario)


def test_without_a_session_nothing_is_submitted() -> None:
    async def main() -> None:
        client = SessionClient("127.0.0.1:1", gateway_id="g", on_change=lambda: None)
        with pytest.raises(PeerLost):
            Reader(client, [1], 1)
        await client.close()

    uvloop.run(main())


def test_unsent_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_client, "MAX_UNSENT", 3)

    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await connected(client)
        for _ in range(3):
            Reader(client, [1], 1)
        with pytest.raises(Overloaded):
            Reader(client, [1], 1)
        await until(lambda: client.inflight == 0)

    run(scenario)


def test_a_reader_over_its_bound_is_aborted_and_others_go_on() -> None:
    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await connected(client)
        slow = Reader(client, [1], 10_000, bound=20)
        assert len(await Reader(client, [2], 200).all()) == 200
        rid, _, _ = await worker.aborted()
        assert rid == slow.rid
        assert isinstance(slow.stream.error, Overloaded)
        assert slow.stream.take() == []
        assert worker.inflight == 0

    run(scenario)


def test_abort() -> None:
    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await connected(client)
        cancelled, stopped = Reader(client, [1], 1000), Reader(client, [2], 1000)
        await until(lambda: worker.inflight == 2)
        client.abort(cancelled.rid)
        client.abort(stopped.rid, stop=True)
        client.abort(10**6)
        await stopped.all()
        assert stopped.stream.ended is not None
        assert stopped.stream.ended.reason is EndReason.STOP
        assert cancelled.stream.ended is None
        assert [reason for _, reason, _ in worker.aborts] == ["", "STOP"]
        assert client.inflight == 0

    run(scenario, stall_after=3)


def test_loss_ends_every_request_and_the_session_comes_back() -> None:
    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await connected(client)
        readers = [Reader(client, [n], 1000) for n in range(5)]
        await until(lambda: worker.inflight == 5)
        port = int(worker.address.rpartition(":")[2])
        await worker.kill()
        await asyncio.gather(*(reader.all() for reader in readers))
        assert all(isinstance(reader.stream.error, PeerLost) for reader in readers)
        assert client.info is None
        assert client.inflight == 0
        await worker.start(port)
        await connected(client)
        assert len(await Reader(client, [1], 2).all()) == 2

    run(scenario, stall_after=2)


class Mute(FakeWorker):
    """Answers Hello with something else than its WorkerInfo, once."""

    async def Session(self, request_iterator: Any, context: Any) -> Any:
        if self.num_sessions == 0:
            self.num_sessions += 1
            yield worker_pb2.SessionResponse(step=1)
            await asyncio.sleep(60)
        async for response in super().Session(request_iterator, context):
            yield response


def test_a_worker_that_does_not_introduce_itself_is_tried_again() -> None:
    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await until(lambda: worker.num_sessions == 2)
        await connected(client)
        assert len(await Reader(client, [1], 3).all()) == 3

    run(scenario, Mute)


@pytest.mark.parametrize("name", ["tokens_from_proto", "ended_from_proto"])
def test_a_frame_that_makes_no_sense_ends_the_session(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_one = getattr(convert, name)
    calls: list[Any] = []

    def fail_once(message: Any) -> Any:
        calls.append(message)
        if len(calls) == 1:
            raise ValueError("makes no sense")
        return convert_one(message)

    monkeypatch.setattr(convert, name, fail_once)

    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await connected(client)
        reader = Reader(client, [1], 2)
        await reader.all()
        assert isinstance(reader.stream.error, PeerLost)
        await until(lambda: worker.num_sessions == 2)
        await connected(client)
        assert len(await Reader(client, [1], 3).all()) == 3

    run(scenario)


def test_load_is_taken_from_frames() -> None:
    async def scenario(worker: FakeWorker, client: SessionClient) -> None:
        await connected(client)
        assert client.load == LoadSnapshot(pages=PageCounts(free=100, total=100))
        Reader(client, [1], 1)
        assert client.dispatched_since_load == 1

    run(scenario)


def test_a_stream_is_a_bounded_buffer() -> None:
    calls: list[int] = []
    stream = SequenceStream(3, lambda: calls.append(1))
    assert stream.put(Tokens(1, 0, (5, 6)))
    assert stream.put(Tokens(1, 2, (7,)))
    assert [tokens.token_ids for tokens in stream.take()] == [(5, 6), (7,)]
    assert stream.put(Tokens(1, 3, (1, 2, 3)))
    assert not stream.put(Tokens(1, 6, (4,)))
    assert isinstance(stream.error, Overloaded)
    assert stream.take() == []
    assert len(calls) == 4


def test_what_arrived_before_a_session_broke_stays() -> None:
    stream = SequenceStream(3, lambda: None)
    stream.put(Tokens(1, 0, (5, 6)))
    stream.fail(PeerLost("gone"))
    assert [tokens.token_ids for tokens in stream.take()] == [(5, 6)]


# ---- TLS ------------------------------------------------------------------------------------------------------------


def test_a_session_comes_back_with_the_certificates_of_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The authority changes while the worker is away; what the session began with would be refused now."""

    async def main() -> None:
        tls = Authority(tmp_path / "old").pod()
        source = between_pods(tls)
        assert source is not None
        worker = FakeWorker()
        address = await worker.start(credentials=server_credentials(source, require_client=True))
        client = SessionClient(
            address,
            gateway_id="g",
            on_change=lambda: None,
            jitter=lambda: 0.1,
            tls=ClientTls.between_pods(source),
        )
        client.start()
        await connected(client)
        await worker.kill()
        await until(lambda: client.info is None)
        successor = Authority(tmp_path / "new")
        chain, key = successor.issue(PEER_NAME)
        for path, data in (
            (tls.peer_certificate_file, chain),
            (tls.peer_key_file, key),
            (tls.peer_ca_file, successor.ca),
        ):
            Path(path).write_bytes(data)
        source.look()
        port = int(address.rpartition(":")[2])
        await worker.start(port, server_credentials(source, require_client=True))
        await connected(client)
        await client.close()
        await worker.kill()

    uvloop.run(main())


def test_why_there_is_no_session_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.rpc.session_client.CONNECT_SECONDS", 0.2)
    monkeypatch.setattr("tandem.rpc.channels._ASK_SECONDS", 20.0)

    async def main() -> None:
        source = between_pods(Authority(tmp_path).pod())
        assert source is not None
        worker = FakeWorker()
        address = await worker.start(credentials=server_credentials(source, require_client=True))
        client = SessionClient(address, gateway_id="g", on_change=lambda: None)
        client.start()
        await until(lambda: "no session with worker" in caplog.text)
        await asyncio.sleep(1.0)  # time for further attempts
        await client.close()
        await worker.kill()

    uvloop.run(main())
    told = [message for message in caplog.messages if "no session with worker" in message]
    assert len(told) == 1
    assert told[0].endswith("it closes the connection: it may want TLS")

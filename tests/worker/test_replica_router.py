"""Which replica gets which message; the test plays both replicas."""

from __future__ import annotations

import pytest

from tandem.config import HandoffConfig
from tandem.core.messages.handoff import (
    EndCode,
    EndStream,
    FirstToken,
    OpenReceived,
    ReleaseReason,
    ReleaseReceived,
    SendFirstToken,
    StreamLost,
)
from tandem.core.messages.requests import Cancel, Ended, EndReason, Submit, Tokens
from tandem.core.messages.sampling import SamplingParams
from tandem.core.messages.worker import Stats
from tandem.core.stats import LoadSnapshot, PageCounts
from tandem.core.token_ids import pack
from tandem.worker.replica_router import ReplicaRouter
from tests.worker.streams import an_open, rank_ready


class Bench:
    """A router with `size` replicas; `got` is what each was sent."""

    def __init__(self, size: int = 2, role: str = "decode") -> None:
        self.now = 0.0
        self.got: list[list[object]] = [[] for _ in range(size)]
        self.router = ReplicaRouter(
            lambda replica, message: self.got[replica].append(message),
            HandoffConfig(lease_seconds=10.0),
            prefix_cache=True,
            clock=lambda: self.now,
        )
        self.router.open_for(rank_ready(role, data_size=size, num_pages=256 * size))

    def send(self, message: object) -> int | None:
        """Send a message; return which replica got it, None if none did."""
        before = [len(each) for each in self.got]
        self.router.send(message)
        grown = [index for index, each in enumerate(self.got) if len(each) > before[index]]
        assert len(grown) <= 1
        return grown[0] if grown else None

    def submit(self, request_id: int, length: int = 8, first: int = 0) -> int | None:
        prompt = pack(range(first, first + length))
        return self.send(Submit(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams()))

    def open(self, stream_id: int, handoff_id: bytes, **changes: object) -> int | None:
        return self.send(OpenReceived(stream_id, an_open(handoff_id=handoff_id, **changes)))

    def ended_stream(self, replica: int, stream_id: int, code: EndCode = EndCode.OK) -> None:
        self.router.heard(replica, EndStream(stream_id, code))


def test_requests_are_spread_and_what_follows_finds_them() -> None:
    bench = Bench()
    homes = [bench.submit(number, first=20 * number) for number in range(4)]
    assert sorted(home for home in homes if home is not None) == [0, 0, 1, 1]
    assert [bench.send(Cancel(number)) for number in range(4)] == homes
    assert bench.send(Cancel(99)) is None


def test_ends_and_first_tokens_make_room_for_others() -> None:
    bench = Bench()
    assert [bench.submit(1, 60), bench.submit(2, 8, 70)] == [0, 1]
    assert bench.submit(3, 8, 80) == 1, "fewer prompt tokens wait there"
    bench.router.heard(0, Tokens(1, 0, (5,)))
    assert bench.submit(4, 8, 90) == 0, "the long prompt is computed"
    bench.router.heard(0, Ended(request_id=1, reason=EndReason.STOP))
    assert bench.send(Cancel(1)) is None
    assert bench.router.balancer is not None and len(bench.router.balancer) == 3


def test_pages_that_a_replica_reports_count() -> None:
    bench = Bench()
    bench.router.heard(0, Stats(LoadSnapshot(pages=PageCounts(free=1, held=255, total=256))))
    assert [bench.submit(number, 8, 20 * number) for number in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("released", [True, False])
def test_attempts_of_a_hand_off_go_where_its_pages_are(released: bool) -> None:
    bench = Bench(role="prefill")
    homes = {bytes([number]): bench.open(number, bytes([number])) for number in range(4)}
    assert sorted(home for home in homes.values() if home is not None) == [0, 0, 1, 1]
    for stream_id in range(4):
        home = homes[bytes([stream_id])]
        assert home is not None
        bench.router.heard(home, SendFirstToken(stream_id, FirstToken(token_id=1)))
        if released:
            assert bench.send(ReleaseReceived(stream_id, ReleaseReason.DONE)) == home
            bench.ended_stream(home, stream_id)
        else:
            assert bench.send(StreamLost(stream_id)) == home
    assert bench.router.balancer is not None and len(bench.router.balancer) == 0
    bench.now = 60.0  # the lease and the scheduler's memory of ended ids
    for number in range(4):
        assert bench.open(10 + number, bytes([number]), attempt=2) == homes[bytes([number])]
    assert len(bench.router.balancer) == 4


def test_a_higher_attempt_beside_the_older_stream() -> None:
    bench = Bench(role="prefill")
    home = bench.open(1, b"a")
    other = bench.open(2, b"b")
    assert home is not None and other is not None and home != other
    assert bench.open(3, b"a", attempt=2) == home
    bench.ended_stream(home, 1, EndCode.SUPERSEDED)
    assert bench.send(StreamLost(1)) is None, "ended from both sides at once: the scheduler needs no telling"
    assert bench.send(ReleaseReceived(3, ReleaseReason.DONE)) == home
    bench.ended_stream(home, 3)
    assert bench.router.balancer is not None and len(bench.router.balancer) == 1


def test_a_forgotten_hand_off_is_a_new_one() -> None:
    bench = Bench(role="prefill")
    home = bench.open(1, b"a")
    bench.send(StreamLost(1))
    bench.now = 70.0
    bench.open(2, b"other", prompt_token_ids=pack([9, 9]))
    assert home == 0 and bench.router.balancer is not None
    assert bench.open(3, b"a") == 0 and len(bench.router.balancer) == 2


def test_beginnings_are_not_shared_across_adapters() -> None:
    bench = Bench()
    prompt = pack(range(60))

    def submit(request_id: int, adapter: str) -> int | None:
        message = Submit(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(), adapter=adapter)
        replica = bench.send(message)
        assert replica is not None
        bench.router.heard(replica, Ended(request_id=request_id, reason=EndReason.STOP))
        return replica

    assert [submit(1, ""), submit(2, "a"), submit(3, "a"), submit(4, "")] == [0, 1, 1, 0]


def test_one_replica_gets_everything() -> None:
    bench = Bench(size=1)
    assert bench.router.balancer is None
    for message in (Cancel(7), StreamLost(3), ReleaseReceived(4, ReleaseReason.DONE)):
        assert bench.send(message) == 0
    assert bench.submit(1) == 0

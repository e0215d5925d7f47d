"""Several ranks as one device, with scripted followers: order, results, losses; nothing makes the loop wait."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest

from tandem.core.messages.plans import Plan, PlanResolved, Row, RowResult
from tandem.core.messages.transfer import Revoke, Revoked
from tandem.core.messages.worker import StartupProgress
from tandem.engine.device import DeviceFailed
from tandem.engine.wire import CollectiveFailed
from tandem.errors import ConfigError, TandemError
from tandem.ipc import Channel
from tandem.worker.follower_messages import FROM_FOLLOWER, TO_FOLLOWER, Beat, FollowerFailed
from tandem.worker.follower_process import Follower
from tandem.worker.followers import Followers, RankLost
from tandem.worker.leader import FollowerLink
from tandem.worker.ranked_device import RankedDevice

SECONDS = 10.0
ROWS = (RowResult(7),)


class Local:
    """Rank 0's own device: executes when it is told to."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self.launched: list[Plan] = []
        self.failure: Exception | None = None
        self._done: list[PlanResolved] = []
        self.adopted: list[int] = []
        self.is_closed = False

    @property
    def unresolved(self) -> int:
        return len(self.launched)

    def launch(self, plan: Plan) -> None:
        self.launched.append(plan)

    def execute(self, rows: tuple[RowResult, ...] = ()) -> None:
        self._done.append(PlanResolved(self.launched.pop(0).plan_id, rows, 0.5))
        os.eventfd_write(self._event, 1)

    def fail(self, error: Exception) -> None:
        self.failure = DeviceFailed(0, error)
        os.eventfd_write(self._event, 1)

    def adopt(self, pages: Sequence[int]) -> None:
        self.adopted += pages

    def fileno(self) -> int:
        return self._event

    def resolved(self) -> list[PlanResolved]:
        if self.failure is not None:
            raise self.failure
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self.is_closed = True


class Rig:
    """A device of `num_ranks`, and the far ends of its followers' channels."""

    def __init__(self, num_ranks: int, drawing_rank: int, stuck_seconds: float) -> None:
        self.local = Local()
        self.progress: list[str] = []
        followers, self.ends = [], {}
        for rank in range(1, num_ranks):
            ours, theirs = socket.socketpair()
            followers.append(Follower(rank, Channel(ours, TO_FOLLOWER, FROM_FOLLOWER), "elsewhere"))
            self.ends[rank] = Channel(theirs, FROM_FOLLOWER, TO_FOLLOWER)
        self.followers = Followers(followers, self.progress.append)
        self.device = RankedDevice(self.local, self.followers, drawing_rank, stuck_seconds)

    def say(self, rank: int, message: object) -> None:
        self.ends[rank].send(message)
        self.ends[rank].flush()

    def executed(self, rank: int, plan_id: int, rows: tuple[RowResult, ...] = (), seconds: float = 0.1) -> None:
        self.say(rank, PlanResolved(plan_id, rows, seconds))

    def heard(self, rank: int) -> list[object]:
        select.select([self.ends[rank]], [], [], SECONDS)
        return list(self.ends[rank].receive())

    def take(self) -> list[PlanResolved]:
        """Wait as the loop does, then take what there is."""
        assert select.select([self.device], [], [], SECONDS)[0], "the device does not wake the loop"
        return self.device.resolved()


Making = Callable[..., Rig]


@pytest.fixture
def make() -> Iterator[Making]:
    rigs: list[Rig] = []

    def made(num_ranks: int = 3, drawing_rank: int = 0, stuck_seconds: float = 60.0) -> Rig:
        rigs.append(Rig(num_ranks, drawing_rank, stuck_seconds))
        return rigs[-1]

    yield made
    for rig in rigs:
        rig.device.close()


def plan(number: int, num_tokens: int = 1) -> Plan:
    row = Row(request_id=0, slot=0, start=0, num_tokens=num_tokens, token_ids=(1,) * num_tokens, pages=(0,))
    return Plan(number, (row,))


def test_a_plan_is_resolved_when_every_rank_has_executed_it(make: Making) -> None:
    rig = make(drawing_rank=2)
    for number in (1, 2):
        rig.device.launch(plan(number))
    assert rig.heard(1) == rig.heard(2) == [plan(1), plan(2)]
    rig.executed(2, 1, ROWS, seconds=0.7)
    rig.local.execute((RowResult(99),))
    assert rig.take() == []
    rig.executed(2, 2, ROWS)
    rig.executed(1, 1)
    taken = rig.take()
    while not taken:
        taken = rig.take()
    assert taken == [PlanResolved(1, ROWS, 0.7)], "the drawing rank's rows, the slowest rank's time"
    assert rig.device.unresolved == 1
    rig.local.execute()
    rig.executed(1, 2)
    while not (taken := rig.take()):
        pass
    assert taken == [PlanResolved(2, ROWS, 0.5)]
    assert rig.device.unresolved == 0
    assert not select.select([rig.device], [], [], 0.05)[0], "nothing is left to wake up for"


def test_a_follower_that_does_not_read_makes_nobody_wait(make: Making) -> None:
    rig = make()
    big = plan(1, 200_000)  # far more than a socket holds
    rig.device.launch(big)  # who reads is this thread: it would not come back
    got: list[object] = []
    while not got:
        assert rig.device.resolved() == []
        assert not select.select([rig.device], [], [], 0.0)[0] or rig.device.resolved() == []
        got = list(rig.ends[1].receive()) if select.select([rig.ends[1]], [], [], 0.01)[0] else []
    assert got == [big]


def test_what_others_say_goes_where_it_belongs(make: Making) -> None:
    rig = make()
    links = [FollowerLink(rig.followers, rank) for rank in (1, 2)]
    links[1].send(Revoke(b"x"))
    assert rig.heard(2) == [Revoke(b"x")]
    rig.say(2, StartupProgress("halfway"))
    rig.say(2, Revoked(b"x"))
    rig.say(1, Beat())
    assert rig.take() == []
    assert rig.progress == ["rank 2: halfway"]
    assert not select.select([links[0].channel], [], [], 0.0)[0]
    assert select.select([links[1].channel], [], [], SECONDS)[0]
    assert links[1].receive() == [Revoked(b"x")] and links[0].receive() == []
    assert not select.select([links[1].channel], [], [], 0.0)[0]
    rig.device.adopt([3])
    assert rig.local.adopted == [3]


def go_on(rig: Rig) -> None:
    while True:
        rig.take()


def lost(rig: Rig) -> TandemError:
    with pytest.raises(TandemError) as caught:
        go_on(rig)
    rig.device.close()
    assert not rig.local.is_closed, "its thread may wait for the lost rank: nobody waits for it"
    return caught.value


def test_the_first_cause_is_told(make: Making) -> None:
    """Rank 1 is gone; rank 2 and rank 0 only fail because of that, and are heard first."""
    rig = make()
    rig.device.launch(plan(1))
    rig.say(2, FollowerFailed("the connection was closed by a peer", by_others=True))
    rig.local.fail(CollectiveFailed("the connection was closed by a peer"))
    rig.ends[1].close()
    error = lost(rig)
    assert isinstance(error, RankLost) and error.message == "rank 1 at elsewhere is gone: its connection ended"


def test_without_a_first_cause_everything_is_told(make: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.worker.followers.SILENT_SECONDS", 600.0)
    rig = make()
    rig.device.launch(plan(1))
    rig.say(2, FollowerFailed("timed out there", by_others=True))
    rig.local.fail(CollectiveFailed("timed out here"))
    assert {"rank 2: timed out there", "timed out here"} >= set(lost(rig).message.split("; "))


@pytest.mark.parametrize(("exit_code", "kind"), [(1, RankLost), (2, ConfigError)])
def test_a_followers_own_fault_keeps_its_kind(make: Making, exit_code: int, kind: type[TandemError]) -> None:
    rig = make()
    rig.say(1, FollowerFailed("no such device", exit_code))
    error = lost(rig)
    assert type(error) is kind and error.message == "rank 1: no such device"


def test_garbage_is_a_loss(make: Making) -> None:
    rig = make()
    rig.ends[2]._socket.send(b"\xff" * 100)
    assert "rank 2" in lost(rig).message


def test_a_plan_that_does_not_get_done_is_a_loss(make: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tandem.worker.ranked_device.time", SimpleNamespace(monotonic=lambda: now[0]))
    rig = make(stuck_seconds=0.4)
    for number in (1, 2):
        rig.device.launch(plan(number))
    now[0] = 0.3
    rig.local.execute()
    rig.executed(1, 1)
    rig.executed(2, 1)
    while not rig.take():
        pass
    now[0] = 0.6
    rig.local.execute()
    rig.executed(1, 2)
    assert rig.take() == [], "a plan's time counts from when it is the first"
    now[0] = 0.8
    assert "plan 2 was not executed within 0.4 s by ranks 2" in lost(rig).message


def test_a_plan_that_is_done_is_never_overdue(make: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the results was away for longer than a plan may last."""
    now = [0.0]
    monkeypatch.setattr("tandem.worker.ranked_device.time", SimpleNamespace(monotonic=lambda: now[0]))
    rig = make(stuck_seconds=0.4)
    rig.device.launch(plan(1))
    rig.local.execute()
    rig.executed(1, 1)
    rig.executed(2, 1)
    now[0] = 60.0
    taken = rig.take()
    assert [resolved.plan_id for resolved in taken] == [1]


def test_the_last_words_of_a_process_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for wait in ("EXIT_SECONDS", "_LAST_WORDS_SECONDS"):
        monkeypatch.setattr(f"tandem.worker.follower_process.{wait}", 10.0)
    script = "import sys; print('this is why', file=sys.stderr); sys.stderr.flush(); import os; os.abort()"
    follower = Follower.spawn(3, (sys.executable, "-c", script))
    assert select.select([follower.channel], [], [], SECONDS)[0]
    assert follower.end() == "rank 3 ended by signal 6; it said last:\nthis is why"
    follower.close(1.0)

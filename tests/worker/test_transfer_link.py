"""The tie to the transfer process: its deaths are told once, it comes back, and the loop never waits for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from tandem.core.messages.transfer import Adopt, Exported, Restart, Revoke, TransferLost, TransferReady
from tandem.ipc import Channel
from tandem.transfer.channel import COMMANDS, OUTCOMES
from tandem.worker.transfer_link import BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN, READY_SECONDS, TransferLink

READY = TransferReady(b"i" * 16, (), ("tcp",))


class Child:
    """A process that only sleeps, so that a kill is a kill; the test speaks for it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, COMMANDS, OUTCOMES)
        self.voice = Channel(theirs, OUTCOMES, COMMANDS)
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        self.stopped = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()
        self.stopped = True

    def say(self, *outcomes: object) -> None:
        for outcome in outcomes:
            self.voice.send(outcome)
        self.voice.flush()


class Bench:
    def __init__(self) -> None:
        self.now = 100.0
        self.children: list[Child] = []
        self.adopted: list[int] = []
        self.fail = False
        self.link = TransferLink(self._spawn, lambda: self.now, self._adopt)

    def _spawn(self) -> Child:
        if self.fail:
            raise OSError("no more processes")
        self.children.append(Child())
        return self.children[-1]

    def _adopt(self, pages: Sequence[int]) -> None:
        self.adopted += pages

    def ready(self) -> Child:
        assert self.link.advance() == []
        child = self.children[-1]
        child.say(READY)
        assert self.link.receive() == [READY]
        return child

    def close(self) -> None:
        self.link.stop()
        for child in self.children:
            child.stop()


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture(autouse=True)
def _ended(bench: Bench) -> object:
    yield
    bench.close()


def test_it_is_started_at_once_and_commands_reach_it(bench: Bench) -> None:
    child = bench.ready()
    assert bench.link.next_due() is None
    bench.link.send(Revoke(b"h" * 16))
    bench.link.flush()
    assert child.voice.receive() == [Revoke(b"h" * 16)]


def test_pages_that_are_here_are_told_to_the_device(bench: Bench) -> None:
    child = bench.ready()
    bench.link.send(Adopt((40, 60)))
    bench.link.flush()
    assert bench.adopted == [40, 60]
    assert child.voice.receive() == [], "the process has nothing to do with it"


def test_it_is_ended_when_asked_to(bench: Bench) -> None:
    child = bench.ready()
    bench.link.send(Restart())
    assert child.process.wait(5.0) == -signal.SIGKILL
    child.voice.close()
    assert [type(event) for event in bench.link.receive()] == [TransferLost]
    bench.link.send(Restart())  # there is none
    assert bench.link.next_due() is not None


def test_a_death_is_told_once_after_the_last_words(bench: Bench) -> None:
    child = bench.ready()
    last = Exported(b"h" * 16, 1, 0, bytes(8))
    child.say(last)
    child.voice.close()
    assert bench.link.receive() == [last]
    lost = bench.link.receive()
    assert [type(event) for event in lost] == [TransferLost]
    assert bench.link.receive() == [] and bench.link.channel is None
    assert child.stopped
    bench.link.send(Revoke(b"h" * 16))  # dropped: nobody awaits an answer any more
    bench.link.flush()


def test_it_comes_back_with_a_bounded_backoff(bench: Bench) -> None:
    waits = []
    for _ in range(10):
        bench.ready()
        bench.children[-1].voice.close()
        assert len(bench.link.receive()) == 1
        due = bench.link.next_due()
        assert due is not None
        waits.append(due - bench.now)
        bench.now = due - 0.001
        count = len(bench.children)
        bench.link.advance()
        assert len(bench.children) == count, "started before its time"
        bench.now = due
    assert waits[0] == pytest.approx(BACKOFF_SECONDS_MIN)
    assert waits[1] == pytest.approx(2 * BACKOFF_SECONDS_MIN)
    assert max(waits) == pytest.approx(waits[-1]) == pytest.approx(BACKOFF_SECONDS_MAX)
    bench.ready()
    bench.now += 60.0  # a long life makes the backoff short again
    bench.children[-1].voice.close()
    bench.link.receive()
    assert bench.link.next_due() == pytest.approx(bench.now + BACKOFF_SECONDS_MIN)


def test_a_life_that_was_never_ready_is_not_lost(bench: Bench) -> None:
    bench.link.advance()
    bench.children[-1].voice.close()
    assert bench.link.receive() == []
    assert bench.link.channel is None


def test_a_process_that_does_not_become_ready_is_replaced(bench: Bench) -> None:
    bench.link.advance()
    assert bench.link.next_due() == bench.now + READY_SECONDS
    bench.now += READY_SECONDS
    assert bench.link.advance() == []
    assert bench.children[0].stopped
    bench.now += BACKOFF_SECONDS_MIN
    bench.ready()
    assert len(bench.children) == 2


def test_a_start_that_fails_is_tried_again(bench: Bench) -> None:
    bench.fail = True
    bench.link.advance()
    assert bench.link.channel is None and bench.link.next_due() == bench.now + BACKOFF_SECONDS_MIN
    bench.fail = False
    bench.now += BACKOFF_SECONDS_MIN
    bench.ready()


def test_a_process_that_reads_nothing_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.ipc.MAX_PENDING_BYTES", 1000)
    child = bench.ready()
    for _ in range(100):
        bench.link.send(Revoke(b"h" * 16))
    status = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert status is not None and status.si_status == signal.SIGKILL
    child.voice.close()  # as the kernel does for a real one
    deadline = time.monotonic() + 5.0
    while not (events := bench.link.receive()):
        assert time.monotonic() < deadline
    assert isinstance(events[0], TransferLost)


def test_garbage_is_the_end_of_a_life(bench: Bench) -> None:
    child = bench.ready()
    child.voice._pending += b"\xff\xff\xff\xff garbage"
    child.voice.flush()
    assert isinstance(bench.link.receive()[0], TransferLost)
    assert child.stopped

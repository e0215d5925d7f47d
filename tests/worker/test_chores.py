"""When figures are sent and when the self-check runs, under a clock of the test's."""

from __future__ import annotations

import logging
from typing import cast

import pytest

from tandem.core.messages.worker import Stats
from tandem.core.scheduler import Scheduler
from tandem.core.settings import SchedulerSettings
from tandem.core.stats import LoadSnapshot, PeerFigures
from tandem.core.tallies import OTHER_PEERS
from tandem.worker.chores import BEAT_SECONDS, CHECK_SECONDS, CHECK_SHARE, IDLE_SECONDS, STATS_SECONDS, Chores


class Bench:
    """Stands in for the scheduler: its figures are a counter, its self-check takes as long as it is told."""

    settings = SchedulerSettings(
        role="decode", num_pages=1, page_tokens=1, max_context_tokens=1, vocab_size=1, numerics="own"
    )

    def __init__(self) -> None:
        self.now = 100.0
        self.sent: list[object] = []
        self.running = 0
        self.checks: list[float] = []
        self.check_seconds = 0.0
        self.faults: list[str] = []
        self.peers: tuple[PeerFigures, ...] = ()
        self.chores = Chores(self.sent.append, lambda: self.now)

    def load(self, now: float) -> LoadSnapshot:
        return LoadSnapshot(running_requests=self.running, peers=self.peers)

    def self_check(self) -> list[str]:
        self.checks.append(self.now)
        self.now += self.check_seconds
        return self.faults

    def turn(self, *, happened: bool = True, idle: bool = False, after: float = 0.0) -> None:
        self.now += after
        self.chores.run(cast(Scheduler, self), happened=happened, idle=idle, now=self.now)

    def sleep_until_due(self) -> None:
        self.now = max(self.now, self.chores.next_due())
        self.turn(happened=False, idle=True)


def test_figures_are_sent_at_once_then_at_most_so_often() -> None:
    bench = Bench()
    for number in range(1, 101):
        bench.running = number
        bench.turn(after=STATS_SECONDS / 20)
    assert 5 <= len(bench.sent) <= 7
    bench.sleep_until_due()
    assert bench.sent[-1] == Stats(LoadSnapshot(running_requests=100)), "the last change is told too"


def test_nothing_is_sent_that_did_not_change() -> None:
    bench = Bench()
    for _ in range(50):
        bench.turn(after=STATS_SECONDS)
    assert len(bench.sent) == 1 + int(49 * STATS_SECONDS / BEAT_SECONDS)


def test_an_idle_loop_still_says_that_it_turns() -> None:
    bench = Bench()
    bench.turn(idle=True)
    bench.sent.clear()
    began = bench.now
    while bench.now < began + 10 * BEAT_SECONDS:
        bench.sleep_until_due()
    assert 9 <= len(bench.sent) <= 10


def test_the_self_check_waits_for_idleness_and_runs_once() -> None:
    bench = Bench()
    for _ in range(10):
        bench.turn(after=IDLE_SECONDS / 2, idle=True)
    assert bench.checks == [], "something happens all the time"
    for _ in range(10):
        bench.turn(after=IDLE_SECONDS, idle=False, happened=False)
    assert bench.checks == [], "the device is busy"
    for _ in range(20):
        bench.sleep_until_due()
    assert len(bench.checks) == 1


def test_self_checks_take_a_small_share_of_the_time() -> None:
    bench = Bench()
    bench.check_seconds = 0.5
    for _ in range(1000):
        bench.turn(idle=True)
        bench.now = min(bench.chores.next_due(), bench.now + CHECK_SECONDS)
        bench.turn(happened=False, idle=True)
    assert len(bench.checks) > 5
    assert len(bench.checks) * bench.check_seconds <= 2 * CHECK_SHARE * (bench.now - 100.0)


def test_what_the_self_check_finds_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.faults = ["page 3 is held by nobody"]
    bench.turn(idle=True)
    for _ in range(3):
        bench.sleep_until_due()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "page 3" in caplog.text


def test_a_pair_of_other_numerics_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.peers = (figures("p:1", "other"), figures("p:2", "own", differing=0), figures(OTHER_PEERS, "", differing=3))
    for bench.running in range(5):
        bench.turn(after=STATS_SECONDS)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "p:1 computes with numerics other, this one with own" in caplog.text
    bench.peers = (figures("p:1", "third"), figures("p:2", ""))
    for bench.running in range(5):
        bench.turn(after=STATS_SECONDS)
    assert len(caplog.records) == 3, "another worker at the same address is another pair"
    assert "p:2 computes with numerics not claimed" in caplog.text


def figures(address: str, numerics: str, differing: int = 1) -> PeerFigures:
    return PeerFigures(address=address, landed=1, failed=0, num_bytes=1, numerics=numerics, differing=differing)

"""What is counted for people: histograms, ends, hand-offs, and each request's timing breakdown."""

from __future__ import annotations

import pytest

from tandem.core.messages.handoff import EndCode
from tandem.core.messages.requests import Cancel, Ended, EndReason
from tandem.core.messages.transfer import PullStatus
from tandem.core.stats import HANDOFF_FAILURES, PULL_RESULTS, WAIT_SECONDS, HistogramCounts
from tandem.core.tallies import MAX_PEERS, OTHER_PEERS, DeviceTime, HandoffTallies, Histogram
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import Rig, one


def count(figures: HistogramCounts) -> int:
    return sum(figures.counts)


def test_a_bound_belongs_to_its_own_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.1):
        histogram.observe(value)
    assert histogram.figures() == HistogramCounts((2, 2, 1), 7.1)


def test_idle_time_is_what_no_plan_covers() -> None:
    steps = Histogram((1.0, 10.0))
    device = DeviceTime(steps)
    assert device.idle_seconds(100.0) == 0.0, "nothing before the first look"
    device.launched(102.0)
    device.launched(103.0)  # behind the first: its step begins when that one is done
    assert device.idle_seconds(104.0) == 2.0
    device.resolved(105.0)
    device.resolved(105.5)
    assert steps.figures() == HistogramCounts((1, 1, 0), 3.5)
    assert device.idle_seconds(107.5) == 4.0
    device.launched(108.5)
    assert device.idle_seconds(200.0) == 5.0


def test_peers_are_bounded_and_nothing_is_lost() -> None:
    tallies = HandoffTallies()
    for number in range(MAX_PEERS + 3):
        tallies.landed(f"p{number}")
    tallies.failed("p0", "tcp", "lost")  # seen again: new, and somebody else goes
    peers = {figures.address: figures for figures in tallies.peers()}
    assert len(peers) == MAX_PEERS + 1
    assert peers[OTHER_PEERS].landed == 4
    assert sum(figures.landed for figures in peers.values()) == MAX_PEERS + 3
    assert peers["p0"].failed == 1


def test_a_prompt_that_is_computed_here() -> None:
    rig = Rig()
    rig.now = 10.0
    rig.submit(1, 6, 3)
    rig.now = 12.0
    rig.plan()
    rig.now = 15.0
    rig.resolve(2.0)
    rig.plan()
    rig.now = 15.5
    rig.resolve()
    rig.plan()
    rig.now = 16.0
    timing = one(rig.resolve(), Ended).timing
    assert (timing.queue_seconds, timing.prefill_seconds, timing.transfer_seconds) == (2.0, 3.0, 0.0)
    assert (timing.first_decode_seconds, timing.decode_seconds) == (0.5, 1.0)
    load = rig.scheduler.load(20.0)
    assert load.queue_seconds.total == 2.0
    assert load.prefill_seconds.total == 3.0
    assert load.first_decode_seconds.total == 0.5
    assert load.step_seconds.total == 4.0
    assert count(load.step_seconds) == count(load.batch_requests) == load.steps == 3
    assert load.batch_tokens.total == load.computed_tokens == 8
    assert load.device_idle_seconds == 4.0
    assert load.ended_requests["length"] == 1
    assert sum(load.ended_requests.values()) == 1


def test_a_prompt_that_was_computed_elsewhere() -> None:
    rig = ImportRig()
    rig.now = 10.0
    rig.submit(1, 10, peers=(peer(1),))
    rig.now = 20.0
    rig.accept(1)
    rig.announce(1, 0, 3)
    rig.now = 20.5
    rig.first_token(1, 50, queue_seconds=4.0, prefill_seconds=6.0)
    rig.now = 22.0
    rig.pull_ended(rig.pulls[0])
    rig.plan()
    rig.now = 22.25
    rig.resolve()
    timing = one(rig.run(), Ended).timing
    assert (timing.queue_seconds, timing.prefill_seconds) == (4.0, 6.0)
    assert (timing.transfer_seconds, timing.first_decode_seconds) == (2.0, 0.25)
    load = rig.scheduler.load(30.0)
    assert load.handoff_seconds.total == 2.0
    assert load.handoff_stall_seconds.total == 1.5
    assert load.first_decode_seconds.total == 0.25
    assert count(load.prefill_seconds) == 0
    assert load.queue_seconds.counts[0] == 1, "pages were there when it was announced"
    (transport,) = load.transports
    assert (transport.transport, transport.num_bytes, transport.pulls["done"]) == ("tcp", 300, 1)
    assert tuple(transport.pulls) == PULL_RESULTS
    assert tuple(transport.failures) == HANDOFF_FAILURES
    (figures,) = load.peers
    assert (figures.address, figures.landed, figures.failed, figures.num_bytes) == ("prefill-1", 1, 0, 300)


@pytest.mark.parametrize(
    ("fault", "transport", "reason"),
    [
        (lambda rig: rig.close(1, EndCode.OVERLOADED), "none", "overloaded"),
        (lambda rig: rig.close(1, EndCode.LOST), "none", "lost"),
        (lambda rig: rig.accept(1, checksum="md5"), "tcp", "incompatible"),
        (lambda rig: (rig.accept(1), rig.announce(1, 2, 1)), "tcp", "protocol"),
        (lambda rig: rig.receive_badly(PullStatus.MISMATCH, bad=[0]), "tcp", "integrity"),
        (lambda rig: rig.receive_badly(PullStatus.FAILED), "tcp", "pull"),
    ],
)
def test_failures_have_a_reason(fault: object, transport: str, reason: str) -> None:
    class Faulty(ImportRig):
        def receive_badly(self, status: PullStatus, **values: list[int]) -> None:
            self.accept(1)
            self.announce(1, 0, 3)
            self.pull_ended(self.pulls[0], status, bad=values.get("bad", []))

    rig = Faulty()
    rig.submit(1, 10, peers=(peer(1),))
    assert callable(fault)
    fault(rig)
    load = rig.scheduler.load(0.0)
    found = {(figures.transport, name): n for figures in load.transports for name, n in figures.failures.items() if n}
    assert found == {(transport, reason): 1}
    assert [figures.failed for figures in load.peers] == [1]


def test_every_end_code_and_pull_status_has_its_word() -> None:
    from tandem.core.import_figures import FAILURE_OF

    assert set(FAILURE_OF) == set(EndCode)
    assert set(FAILURE_OF.values()) <= set(HANDOFF_FAILURES)
    assert {status.value for status in PullStatus} == set(PULL_RESULTS)


def test_a_request_that_never_began_only_waited() -> None:
    rig = Rig()
    rig.submit(1, 6, 3)
    rig.now = 7.0
    timing = one(rig.send(Cancel(1)), Ended).timing
    assert (timing.queue_seconds, timing.prefill_seconds, timing.decode_seconds) == (7.0, 0.0, 0.0)
    ended = rig.scheduler.load(7.0).ended_requests
    assert ended["cancelled"] == 1
    assert set(ended) == {reason.value for reason in EndReason}


def test_waits_of_minutes_are_told_apart() -> None:
    assert {30, 60, 120, 300, 600} <= set(WAIT_SECONDS)

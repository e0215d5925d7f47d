"""Decode's pages: held prefixes and who takes them, the receive queue, cancels, and what ends a request early."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.config import SchedulerConfig
from tandem.core.messages.handoff import DropStream, EndCode, OpenStream, ReleaseReason, SendRelease
from tandem.core.messages.requests import Cancel, CancelCause, Drain, Ended, EndReason
from tandem.core.messages.transfer import CancelPull, Pull, PullStatus
from tandem.core.states import State
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import of_type, one, prompt_of


def warm(**changes: Any) -> ImportRig:
    """Two pages of prompt_of(10, 500) are cached."""
    rig = ImportRig(**changes)
    rig.submit(90, prompt_of(9, 500), 1)
    rig.run()
    assert len(rig.scheduler.kv.tree) == 2
    return rig


# ---- held prefix --------------------------------------------------------------------------------------------------


def test_a_held_prefix_is_pinned_and_not_pulled() -> None:
    rig = warm()
    rig.submit(1, prompt_of(10, 500), peers=(peer(1),))
    assert rig.streams[0].open.tokens_held == 8
    assert rig.scheduler.kv.pool.counts().held == 2
    effects = rig.receive(1, 3, 50, first=2)
    assert one(effects, Pull).ordinals == (2,)
    rig.run()
    assert rig.outputs(1) == [50, 11, 12, 13]


def test_a_held_prefix_is_shorter_than_what_is_handed_over() -> None:
    rig = warm()
    rig.submit(1, prompt_of(8, 500), peers=(peer(1),))
    assert rig.streams[0].open.tokens_held == 4


def test_a_later_attempt_holds_nothing() -> None:
    rig = warm()
    rig.submit(1, prompt_of(10, 500), peers=(peer(1),))
    rig.accept(1)
    (again,) = of_type(rig.close(1, EndCode.LOST), OpenStream)
    assert (again.open.tokens_held, again.open.attempt) == (0, 1 << 32 | 2)
    assert rig.scheduler.kv.pool.counts().held == 0


def test_an_older_request_takes_the_prefix_of_the_youngest_that_awaits() -> None:
    rig = warm(num_pages=8)
    rig.submit(1, 28, 1, peers=(peer(1),))
    rig.submit(2, prompt_of(10, 500), 1, peers=(peer(2),))
    rig.submit(3, prompt_of(10, 500), 1, peers=(peer(3),))
    rig.accept(1)
    effects = rig.announce(1, 0, 7)
    # 7 of 8 pages; two are held by 2 and 3 together, so both must let go, the youngest first
    assert of_type(effects, DropStream) == [DropStream(3), DropStream(2)]
    assert [(stream.address, stream.open.tokens_held) for stream in of_type(effects, OpenStream)] == [
        ("prefill-3", 0),
        ("prefill-2", 0),
    ]
    assert rig.request(1).state is State.RECEIVING
    assert rig.request(2).state is rig.request(3).state is State.AWAITING


def test_a_request_that_lost_its_prefix_leaves_the_receive_queue() -> None:
    rig = warm(num_pages=8)
    rig.submit(1, 12, 1, peers=(peer(1),))  # 3 pages
    rig.receive(1, 3, 50)  # ends with its first token
    rig.submit(2, 20, 8)
    rig.step()  # 5 pages decode; 2 are cached, 1 is free
    rig.submit(3, prompt_of(10, 500), 1, peers=(peer(3),))  # holds the cached two, needs one beside the spare one
    rig.accept(2)
    rig.announce(2, 2, 1)
    assert rig.request(3).state is State.AWAITING
    assert rig.scheduler.load(0.0).transfers_waiting == 1
    while rig.request(2).num_outputs < 6:
        rig.step()
    assert rig.scheduler.load(0.0).transfers_waiting == 0
    assert rig.streams[-1].open.tokens_held == 0
    rig.run()
    assert rig.ended(2).reason is EndReason.LENGTH
    assert rig.scheduler.load(0.0).retractions == 0, "pins go before anybody's work"


def test_losing_a_prefix_is_not_a_try_of_the_peer() -> None:
    plain, robbed = warm(num_pages=8), warm(num_pages=8)
    for rig in (plain, robbed):
        rig.submit(2, prompt_of(10, 500), 1, peers=(peer(2),))
    robbed.submit(1, 28, 1)
    robbed.run()
    assert robbed.streams[-1].open.tokens_held == 0
    tries = []
    for rig in (plain, robbed):
        before = len(rig.streams)
        while rig.request(2).state is not State.WAITING:
            rig.accept(len(rig.streams))
            rig.close(len(rig.streams), EndCode.LOST)
        tries.append(len(rig.streams) - before)
    assert tries[0] == tries[1]


@pytest.mark.parametrize("received", [False, True])
def test_pins_are_left_alone_while_enough_pages_come_back_by_themselves(received: bool) -> None:
    """What a launch in flight still holds is there soon: nobody has to open again for it."""
    rig = warm(num_pages=8)
    rig.submit(1, prompt_of(10, 500), 4, peers=(peer(1),))  # pins 2 of 8
    rig.submit(2, 24, 1)
    rig.plan()
    rig.send(Cancel(2))
    rig.submit(3, 24, 1, peers=(peer(3),) if received else ())
    if received:
        rig.accept(2)
        rig.announce(2, 0, 6)
    assert rig.plan() == ()
    assert of_type(rig.heard, DropStream) == []
    rig.resolve()
    rig.plan()
    assert rig.request(3).state is (State.RECEIVING if received else State.EXTENDING)
    assert rig.request(1).pages


# ---- the receive queue --------------------------------------------------------------------------------------------


def test_pages_are_given_in_the_order_of_the_first_announcement() -> None:
    rig = ImportRig(num_pages=8)
    rig.submit(9, 20, 1)
    rig.plan()
    for number in (1, 2):
        rig.submit(number, 16, 2, peers=(peer(number),))
        rig.accept(number)
    rig.announce(2, 0, 1)
    rig.announce(1, 0, 1)
    assert rig.scheduler.load(0.0).transfers_waiting == 2
    rig.resolve()
    assert rig.request(2).state is rig.request(1).state is State.RECEIVING
    assert [pull.handoff_id for pull in rig.pulls] == [peer(2).handoff_id, peer(1).handoff_id]


def test_a_slot_is_needed_to_receive() -> None:
    rig = ImportRig(scheduler=SchedulerConfig(max_running_requests=1))
    rig.submit(1, 4, 2)
    rig.plan()
    rig.submit(2, 10, peers=(peer(2),))
    rig.accept(1)
    assert not of_type(rig.announce(1, 0, 3), Pull)
    effects = rig.resolve()
    rig.plan()
    effects += rig.resolve()
    assert one(effects, Pull).ordinals == (0, 1, 2)


@pytest.mark.parametrize("local_first", [False, True])
def test_who_came_first_is_served_first_whether_it_is_received_or_computed(local_first: bool) -> None:
    """Neither kind starves the other: 6 pages are wanted by each, and 8 are there."""
    rig = ImportRig(num_pages=8)
    rig.submit(9, 20, 1)
    rig.plan()
    order = (1, 2) if local_first else (2, 1)
    for number in order:
        rig.submit(number, 24, 1, peers=(peer(2),) if number == 2 else ())
    rig.accept(1)
    rig.announce(1, 0, 1)
    rig.resolve()
    rig.plan()
    states = {number: rig.request(number).state for number in (1, 2)}
    if local_first:
        assert states == {1: State.EXTENDING, 2: State.AWAITING}
    else:
        assert states == {1: State.WAITING, 2: State.RECEIVING}


def test_retracted_requests_go_before_those_that_receive() -> None:
    rig = ImportRig(num_pages=6)
    for number in (1, 2, 3):
        rig.submit(number, 5, 12)
    rig.step()
    while not rig.scheduler.load(0.0).retractions:
        rig.step()
    rig.submit(4, 4, 2, peers=(peer(4),))
    rig.accept(1)
    rig.announce(1, 0, 1)
    assert rig.request(4).state is State.AWAITING
    rig.scheduler.drain_effects()
    while rig.request(4).state is State.AWAITING:
        assert 3 in rig.scheduler._ledger.requests
        rig.step()
    assert rig.request(3).state is not State.WAITING


# ---- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", list(CancelCause))
@pytest.mark.parametrize("moment", ["awaiting", "receiving"])
def test_cancel_of_a_hand_off(cause: CancelCause, moment: str) -> None:
    """A client that left releases the prefill; a lost session leaves it to its lease, for another decode worker."""
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1),))
    if moment == "receiving":
        rig.accept(1)
        rig.announce(1, 0, 2)
    effects = rig.send(Cancel(1, cause))
    lost = cause is CancelCause.SESSION_LOST
    assert of_type(effects, DropStream) == ([DropStream(1)] if lost else [])
    assert of_type(effects, SendRelease) == ([] if lost else [SendRelease(1, ReleaseReason.ABANDONED)])
    assert one(effects, Ended).reason is (EndReason.STOP if cause is CancelCause.STOP_STRING else EndReason.CANCELLED)
    if moment == "receiving":
        assert one(effects, CancelPull).ticket == rig.pulls[0].ticket
        counts = rig.scheduler.kv.pool.counts()
        assert (counts.free, counts.quarantined) == (30, 2), "the page that nothing is read into is free at once"
        rig.pull_ended(rig.pulls[0], PullStatus.CANCELLED, good=[0])
    assert rig.scheduler.idle
    assert rig.num_free == 32
    assert rig.announce(1, 2, 1) == []


def test_the_deadline_abandons_a_hand_off() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1),), timeout=1.0)
    effects = rig.wait(1.0)
    assert one(effects, SendRelease).reason is ReleaseReason.ABANDONED
    assert one(effects, Ended).reason is EndReason.DEADLINE


def test_an_attempt_after_the_deadline_has_no_negative_time() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1), peer(2)), timeout=1.0)
    rig.now = 3.0
    effects = rig.close(1, EndCode.OVERLOADED)
    assert all((stream.open.timeout_seconds or 0.0) >= 0.0 for stream in of_type(effects, OpenStream))
    assert one(effects, Ended).reason is EndReason.DEADLINE


def test_a_drain_leaves_streams_to_their_lease() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1),))
    effects = rig.send(Drain(1.0))
    assert of_type(effects, DropStream) == [DropStream(1)]
    assert one(effects, Ended).reason is EndReason.DRAINED, "it would only wait for a hand-off here"
    assert rig.scheduler.finished()


def test_a_finished_drain_waits_for_reads_under_way() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1),))
    rig.accept(1)
    rig.announce(1, 0, 3)
    effects = rig.send(Drain(1.0))
    assert one(effects, Ended).reason is EndReason.DRAINED
    assert of_type(effects, DropStream) == [DropStream(1)]
    assert not rig.scheduler.finished()
    rig.pull_ended(rig.pulls[0], PullStatus.CANCELLED)
    assert rig.scheduler.finished()

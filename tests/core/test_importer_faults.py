"""Decode's side of a hand-off that goes wrong: once more, the next peer, the last resort, and fences."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.config import HandoffConfig, SchedulerConfig
from tandem.core.messages.handoff import (
    Complete,
    DropStream,
    EndCode,
    OpenStream,
    ReleaseReason,
    SendRelease,
    StreamCompleted,
)
from tandem.core.messages.requests import EndReason, Tokens
from tandem.core.messages.transfer import CancelPull, Pull, PullStatus, TransferLost
from tandem.core.states import State
from tests.core.import_rig import ENDPOINT, ImportRig, peer
from tests.core.rig import of_type, one

NEXT = [EndCode.INVALID, EndCode.MISMATCH, EndCode.STALE_ATTEMPT, EndCode.SUPERSEDED, EndCode.OVERLOADED]


def pulling(num_peers: int = 2, **changes: Any) -> ImportRig:
    """Three pages of request 1 are being pulled from peer 1."""
    rig = ImportRig(**changes)
    rig.submit(1, 10, peers=tuple(peer(number) for number in range(1, num_peers + 1)))
    rig.accept(1)
    rig.announce(1, 0, 3)
    return rig


def opened(effects: list[object]) -> list[tuple[str, int]]:
    return [(stream.address, stream.open.attempt & 0xFFFFFFFF) for stream in of_type(effects, OpenStream)]


# ---- mismatches ---------------------------------------------------------------------------------------------------


def test_a_mismatch_is_pulled_once_more_into_the_same_place() -> None:
    rig = pulling()
    rig.first_token(1, 50)
    again = one(rig.pull_ended(rig.pulls[0], PullStatus.MISMATCH, bad=[1]), Pull)
    assert again.ordinals == (1,)
    assert again.pages == (rig.request(1).pages[1],)
    assert rig.request(1).state is State.RECEIVING
    assert one(rig.pull_ended(again), SendRelease).reason is ReleaseReason.DONE
    assert rig.request(1).state is State.DECODING
    assert rig.scheduler.load(0.0).checksum_mismatches == 1


def test_the_second_mismatch_of_a_page_turns_to_the_next_peer() -> None:
    rig = pulling()
    again = one(rig.pull_ended(rig.pulls[0], PullStatus.MISMATCH, bad=[1]), Pull)
    effects = rig.pull_ended(again, PullStatus.MISMATCH, bad=[1])
    assert one(effects, SendRelease) == SendRelease(1, ReleaseReason.LOCAL)
    assert opened(effects) == [("prefill-2", 2)]
    assert rig.request(1).state is State.AWAITING
    assert rig.num_free == 32


def test_other_pages_may_mismatch_once_each() -> None:
    rig = pulling()
    again = one(rig.pull_ended(rig.pulls[0], PullStatus.MISMATCH, bad=[0, 2]), Pull)
    assert again.ordinals == (0, 2)
    rig.first_token(1, 50)
    rig.pull_ended(again)
    assert rig.request(1).state is not State.RECEIVING


def test_a_page_is_not_pulled_again_while_it_is_read() -> None:
    rig = ImportRig(handoff=HandoffConfig(pull_pages_max=1))
    rig.submit(1, 10, peers=(peer(1),))
    rig.accept(1)
    first, second = of_type(rig.announce(1, 0, 2), Pull)
    assert one(rig.pull_ended(first, PullStatus.MISMATCH, bad=[0]), Pull).ordinals == (0,)
    assert one(rig.announce(1, 2, 1), Pull).ordinals == (2,)
    assert second.ticket not in {pull.ticket for pull in rig.pulls[2:]}


# ---- pulls and streams that fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [PullStatus.FAILED, PullStatus.REFUSED])
def test_a_failed_pull_tries_the_same_peer_with_a_higher_attempt(status: PullStatus) -> None:
    rig = pulling()
    rig.first_token(1, 50)
    effects = rig.pull_ended(rig.pulls[0], status, good=[0])
    assert of_type(effects, DropStream) == [DropStream(1)], "no Release: the pages are wanted still"
    assert opened(effects) == [("prefill-1", 2)]
    assert rig.scheduler.load(0.0).failed_pulls == 1
    assert rig.request(1).pages == []
    pull = one(rig.receive(2, 3, 50), Pull)
    assert (pull.ordinals, pull.attempt, pull.token) == ((0, 1, 2), 1 << 32 | 2, b"token-2")
    rig.run()
    assert rig.outputs(1) == [50, 11, 12, 13], "the first token was not taken twice"


def test_a_lost_stream_is_opened_again_and_its_pages_stay_quarantined() -> None:
    rig = pulling(1)
    pages = rig.pulls[0].pages
    effects = rig.close(1, EndCode.LOST)
    assert not of_type(effects, DropStream), "it is closed already"
    assert one(effects, CancelPull).ticket == rig.pulls[0].ticket
    assert opened(effects) == [("prefill-1", 2)]
    assert rig.request(1).state is State.AWAITING
    pool = rig.scheduler.kv.pool
    assert all(pool.is_busy(page) for page in pages)
    assert pool.counts().quarantined == 3
    rig.accept(2)
    fresh = one(rig.announce(2, 0, 3), Pull)
    assert set(fresh.pages).isdisjoint(pages), "nothing else is read into pages under a read"
    rig.pull_ended(rig.pulls[0], PullStatus.CANCELLED)
    assert pool.counts().quarantined == 0
    assert rig.request(1).state is State.RECEIVING, "the end of an older attempt's pull says nothing of this one"


def test_what_an_older_stream_still_says_is_not_heard() -> None:
    rig = pulling(1)
    rig.close(1, EndCode.LOST)
    for effects in (rig.accept(1), rig.announce(1, 0, 3), rig.first_token(1, 50), rig.close(1)):
        assert effects == []
    assert rig.request(1).state is State.AWAITING


@pytest.mark.parametrize("code", NEXT)
def test_a_refusal_turns_to_the_next_peer(code: EndCode) -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1), peer(2)))
    effects = rig.close(1, code)
    assert opened(effects) == [("prefill-2", 2)]
    assert not of_type(effects, SendRelease), "the peer has ended the stream"
    assert rig.scheduler.load(0.0).fenced_instance_ids == ()


@pytest.mark.parametrize(
    "accepted", [{"endpoints": ()}, {"checksum": "crc"}], ids=["no transport in common", "another checksum"]
)
def test_a_peer_that_cannot_be_pulled_from_is_passed_over(accepted: dict[str, Any]) -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1), peer(2)))
    effects = rig.accept(1, **accepted)
    assert one(effects, SendRelease) == SendRelease(1, ReleaseReason.LOCAL)
    assert opened(effects) == [("prefill-2", 2)]


@pytest.mark.parametrize(("first", "count"), [(1, 2), (0, 4), (0, 0)], ids=["gap", "too many", "empty"])
def test_an_announcement_that_does_not_add_up_is_a_fault(first: int, count: int) -> None:
    rig = ImportRig(handoff=HandoffConfig(fence_faults=1))
    rig.submit(1, 10, peers=(peer(1), peer(2)))
    rig.accept(1)
    assert opened(rig.announce(1, first, count)) == [("prefill-2", 2)]
    assert rig.scheduler.load(0.0).fenced_instance_ids == (peer(1).instance_id,)


def test_complete_before_everything_is_announced_is_a_fault() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1), peer(2)))
    rig.accept(1)
    rig.announce(1, 0, 2)
    assert opened(rig.send(StreamCompleted(1, Complete()))) == [("prefill-2", 2)]


def test_a_first_token_out_of_the_vocabulary_is_a_fault() -> None:
    rig = pulling()
    effects = rig.first_token(1, rig.settings.vocab_size)
    assert not of_type(effects, Tokens)
    assert opened(effects) == [("prefill-2", 2)]


# ---- the last resort ----------------------------------------------------------------------------------------------


def test_after_the_last_peer_the_prompt_is_computed_here() -> None:
    rig = pulling()
    rig.first_token(1, 50)
    rig.close(1, EndCode.OVERLOADED)
    rig.close(2, EndCode.DRAINING)
    assert rig.request(1).state is State.WAITING
    assert rig.scheduler.load(0.0).local_prefills == 1
    (row,) = rig.plan()
    assert (row.start, row.num_tokens) == (0, 11), "the first token counts as known"
    assert row.sample is not None
    assert row.sample.output_index == 1
    rig.run()
    assert rig.outputs(1) == [50, 11, 12, 13]
    rig.pull_ended(rig.pulls[0], PullStatus.CANCELLED)
    assert rig.num_free == 32


def test_local_prefills_are_bounded() -> None:
    rig = ImportRig(scheduler=SchedulerConfig(budget_tokens=4, max_local_prefills=2))
    for number in range(1, 5):
        rig.submit(number, 10, 1, peers=(peer(number),))
        rig.close(number, EndCode.OVERLOADED)
    rig.submit(9, 4, 1)
    seen: set[int] = set()
    while rows := rig.plan():
        extending = [other.request_id for other in rig.scheduler._ledger.running if other.state is State.EXTENDING]
        assert len([number for number in extending if number != 9]) <= 2
        seen |= {row.request_id for row in rows}
        rig.resolve()
    assert seen == {1, 2, 3, 4, 9}


@pytest.mark.parametrize("attempts_max", [1, 2, 4])
def test_streams_of_a_request_are_bounded(attempts_max: int) -> None:
    rig = ImportRig(handoff=HandoffConfig(attempts_max=attempts_max, fence_faults=99))
    rig.submit(1, 10, peers=(peer(1), peer(2), peer(3)))
    while rig.request(1).state is not State.WAITING:
        rig.accept(len(rig.streams))
        rig.close(len(rig.streams), EndCode.LOST)
    assert len(rig.streams) == attempts_max
    attempts = [stream.open.attempt for stream in rig.streams]
    assert attempts == sorted(set(attempts)), "each higher than the one before"


# ---- fences -------------------------------------------------------------------------------------------------------


def test_repeated_faults_fence_a_peer_for_a_while() -> None:
    rig = ImportRig(handoff=HandoffConfig(fence_faults=2, fence_seconds=5.0))
    for number in (1, 2):
        rig.submit(number, 10, peers=(peer(1),))
        rig.close(number, EndCode.LOST)
    assert rig.scheduler.load(rig.now).fenced_instance_ids == (peer(1).instance_id,)
    assert opened(rig.submit(3, 10, peers=(peer(1), peer(2)))) == [("prefill-2", 1)]
    assert opened(rig.submit(4, 10, peers=(peer(1),))) == []
    assert rig.request(4).state is State.WAITING
    rig.wait(5.0)
    assert rig.scheduler.load(rig.now).fenced_instance_ids == ()
    assert opened(rig.submit(5, 10, peers=(peer(1),))) == [("prefill-1", 1)]


def test_a_hand_off_that_succeeds_clears_earlier_faults() -> None:
    rig = ImportRig(handoff=HandoffConfig(fence_faults=2))
    rig.submit(1, 10, 1, peers=(peer(1),))
    rig.close(1, EndCode.LOST)
    rig.run()
    rig.submit(2, 10, 4, peers=(peer(1),))
    rig.receive(len(rig.streams), 3, 50)
    rig.submit(3, 10, 1, peers=(peer(1),))
    rig.close(len(rig.streams), EndCode.LOST)
    assert rig.scheduler.load(0.0).fenced_instance_ids == ()


# ---- the transfer process -----------------------------------------------------------------------------------------


def test_a_lost_transfer_process_proves_its_reads_over_and_they_are_asked_for_again() -> None:
    rig = pulling()
    rig.first_token(1, 50)
    pages = rig.pulls[0].pages
    rig.send(TransferLost())
    assert not any(rig.scheduler.kv.pool.is_busy(page) for page in pages)
    assert rig.request(1).state is State.RECEIVING
    again = one(rig.transfer_ready(), Pull)
    assert (again.ordinals, again.pages) == ((0, 1, 2), pages)
    assert rig.pull_ended(rig.pulls[0]) == [], "of the process that is gone"
    assert rig.request(1).state is State.RECEIVING
    rig.pull_ended(again)
    assert rig.request(1).state is State.DECODING


def test_without_a_transfer_process_pages_wait() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1),))
    rig.send(TransferLost())
    rig.accept(1)
    rig.announce(1, 0, 1)
    assert rig.pulls == []
    rig.announce(1, 1, 2)
    assert one(rig.transfer_ready(), Pull).ordinals == (0, 1, 2)


def test_pages_of_an_ended_request_are_free_once_the_transfer_process_is_gone() -> None:
    rig = pulling()
    rig.first_token(1, 2)  # EOS
    assert rig.ended(1).reason is EndReason.STOP
    assert rig.scheduler.kv.pool.counts().quarantined == 3
    rig.send(TransferLost())
    assert rig.scheduler.idle
    assert rig.num_free == 32


def test_the_endpoint_is_the_importers_choice() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1),))
    other = type(ENDPOINT)(transport="mooncake", address="x", instance_id=b"x")
    rig.accept(1, endpoints=(other, ENDPOINT))
    assert one(rig.announce(1, 0, 1), Pull).endpoints == (ENDPOINT,)

"""What is refused at the border, and how a worker is told to stop."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.config import SchedulerConfig
from tandem.core.messages.requests import Cancel, CancelCause, Drain, Ended, EndReason, PrefillPeer
from tests.core.export_rig import ExportRig
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import Rig, of_type, one


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "changes", "field"),
    [
        (0, 4, {}, "prompt"),
        (96, 4, {}, "prompt"),
        (20, 4, {"num_pages": 4}, "prompt"),
        (10, 60, {"num_pages": 16}, "max_tokens"),
    ],
)
def test_refused_lengths(prompt: int, max_tokens: int, changes: dict[str, Any], field: str) -> None:
    rig = Rig(**changes)
    end = one(rig.submit(1, prompt, max_tokens), Ended)
    assert (end.reason, end.field_name, end.overloaded) == (EndReason.REJECTED, field, False)
    assert end.message
    assert rig.scheduler.idle


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "changes"),
    [(95, 100, {}), (10, 55, {"num_pages": 16}), (64, 1, {"num_pages": 16}), (63, 2, {"num_pages": 16})],
)
def test_the_longest_that_fits_is_served(prompt: int, max_tokens: int, changes: dict[str, Any]) -> None:
    """The last token needs no KV of its own."""
    rig = Rig(**changes)
    rig.submit(1, prompt, max_tokens)
    rig.run()
    assert rig.ended(1).reason is EndReason.LENGTH
    assert len(rig.outputs(1)) == min(max_tokens, 96 - prompt)


def test_a_full_queue_is_overload() -> None:
    rig = ImportRig(scheduler=SchedulerConfig(max_waiting_requests=2))
    rig.submit(1, 5)
    rig.submit(2, 5, peers=(peer(1),))
    end = one(rig.submit(3, 5), Ended)
    assert (end.reason, end.overloaded) == (EndReason.REJECTED, True)
    rig.plan()
    assert not of_type(rig.submit(4, 5), Ended), "a running request does not wait"


def test_a_prefill_worker_takes_no_requests() -> None:
    assert one(ExportRig().submit(1, 5), Ended).reason is EndReason.REJECTED


@pytest.mark.parametrize("output_tokens", [-1, 2])
def test_a_peer_with_more_output_than_the_request_is_refused(output_tokens: int) -> None:
    named = (peer(1), peer(2, output_tokens=output_tokens))
    end = one(ImportRig().submit(1, 5, outputs=[7], peers=named), Ended)
    assert (end.reason, end.field_name) == (EndReason.REJECTED, "peers")


# ---- deadline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["waiting", "extending", "decoding"])
def test_the_deadline_ends_a_request_whatever_it_does(moment: str) -> None:
    rig = Rig()
    rig.submit(1, 5, 20, timeout=1.0)
    if moment != "waiting":
        rig.plan()
    if moment == "decoding":
        rig.resolve()
        rig.plan()
    assert rig.scheduler.next_timer() == 1.0
    assert rig.wait(0.9) == []
    end = one(rig.wait(0.1), Ended)
    assert (end.reason, end.request_id) == (EndReason.DEADLINE, 1)
    while rig.in_flight:
        assert not of_type(rig.resolve(), Ended)
    assert rig.scheduler.idle
    assert rig.num_free == rig.settings.num_pages


def test_a_deadline_that_has_passed_ends_at_once() -> None:
    rig = Rig()
    assert one(rig.submit(1, 5, timeout=0.0), Ended).reason is EndReason.DEADLINE


def test_the_deadline_of_an_ended_request_is_nobodys() -> None:
    rig = Rig()
    rig.submit(1, 5, 1, timeout=1.0)
    rig.run()
    assert rig.wait(2.0) == []


# ---- cancel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (CancelCause.CLIENT, EndReason.CANCELLED),
        (CancelCause.SESSION_LOST, EndReason.CANCELLED),
        (CancelCause.STOP_STRING, EndReason.STOP),
    ],
)
def test_cancel(cause: CancelCause, reason: EndReason) -> None:
    rig = Rig()
    rig.submit(1, 5)
    rig.plan()
    assert one(rig.send(Cancel(1, cause)), Ended).reason is reason
    pool = rig.scheduler.kv.pool
    assert pool.num_free == rig.settings.num_pages - 2, "a launch may still write into them"
    assert pool.counts().quarantined == 2
    assert rig.resolve() == []
    assert pool.num_free == rig.settings.num_pages
    assert rig.scheduler.load(0.0).discarded_rows == 1
    assert rig.send(Cancel(1, cause)) == []
    assert rig.send(Cancel(77, cause)) == []


# ---- drain --------------------------------------------------------------------------------------------------------


def test_drain_refuses_new_work_and_finishes_old() -> None:
    rig = Rig()
    rig.submit(1, 5, 3)
    rig.send(Drain())
    assert one(rig.submit(2, 5), Ended).reason is EndReason.DRAINED
    assert rig.scheduler.load(0.0).draining
    assert not rig.scheduler.finished()
    rig.run()
    assert rig.ended(1).reason is EndReason.LENGTH
    assert rig.scheduler.finished()


def test_grace_bounds_a_drain() -> None:
    rig = Rig()
    rig.submit(1, 5, 20)
    rig.plan()
    rig.send(Drain(2.0))
    rig.wait(1.9)
    assert one(rig.wait(0.1), Ended).reason is EndReason.DRAINED
    assert not rig.scheduler.finished(), "a launch is in flight"
    rig.resolve()
    assert rig.scheduler.finished()


def test_a_bounded_drain_hands_back_what_has_not_begun() -> None:
    rig = Rig()
    rig.submit(1, 5, 20)
    rig.plan()
    rig.submit(2, 5, 20)
    assert one(rig.send(Drain(2.0)), Ended).request_id == 2
    assert rig.ended(2).reason is EndReason.DRAINED
    assert one(rig.send(Drain(0.0)), Ended).request_id == 1, "a second one hurries"
    rig.resolve()
    assert rig.scheduler.finished()


def test_an_idle_worker_that_is_not_told_to_stop_is_not_finished() -> None:
    rig = Rig()
    assert rig.scheduler.idle
    assert not rig.scheduler.finished()


def test_events_of_another_role_are_a_bug() -> None:
    with pytest.raises(KeyError):
        Rig().send(PrefillPeer(address="", instance_id=b"", handoff_id=b"", attempt=1))

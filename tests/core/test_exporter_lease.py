"""Prefill's side of a hand-off: higher attempts, releases and leases, and the transfer process."""

from __future__ import annotations

import pytest

from tandem.config import HandoffConfig, SchedulerConfig
from tandem.core.messages.handoff import (
    EndCode,
    EndStream,
    ReleaseReason,
    SendAccepted,
    SendComplete,
    SendFirstToken,
)
from tandem.core.messages.requests import Drain
from tandem.core.messages.transfer import Export as ExportPages
from tandem.core.messages.transfer import Revoke, Revoked, TransferLost
from tandem.core.states import State
from tests.core.export_rig import ExportRig, announced, end_codes, handoff_id, refusal
from tests.core.rig import of_type, one

LEASE = HandoffConfig(lease_seconds=1.0)


# ---- rule 3: attempts ---------------------------------------------------------------------------------------------


def test_a_higher_attempt_attaches_and_is_announced_everything() -> None:
    rig = ExportRig(scheduler=SchedulerConfig(budget_tokens=4))
    first = one(rig.open(1, 1, 10), SendAccepted).accepted
    rig.plan()
    rig.resolve()
    effects = rig.open(2, 1, 10, attempt=2, importer=b"another")
    assert [(end.stream_id, end.code) for end in of_type(effects, EndStream)] == [(1, EndCode.SUPERSEDED)]
    second = one(effects, SendAccepted).accepted
    assert second.handoff_token != first.handoff_token
    assert one(effects, ExportPages).attempt == 2
    assert one(effects, ExportPages).token == second.handoff_token
    assert announced(effects) == [(0, 1, 4)]
    effects = rig.compute()
    assert announced(effects) == [(1, 1, 8), (2, 1, 10)]
    computed = rig.scheduler.load(0.0).computed_tokens
    effects = rig.open(3, 1, 10, attempt=3, held=4)
    assert announced(effects) == [(1, 2, 10)], "from its own tokens_held on"
    assert one(effects, SendFirstToken).first_token.token_id == 10
    assert of_type(effects, SendComplete)
    assert rig.scheduler.load(0.0).computed_tokens == computed == 10
    assert rig.release(1) == rig.release(2) == []
    rig.release(3)
    assert rig.scheduler.idle


@pytest.mark.parametrize("attempt", [0, 4, 5])
def test_an_attempt_that_is_not_higher_is_refused(attempt: int) -> None:
    rig = ExportRig()
    rig.open(1, 1, attempt=5)
    assert end_codes(rig.open(2, 1, attempt=attempt)) == [(2, EndCode.STALE_ATTEMPT)]
    rig.lose(1)
    assert end_codes(rig.open(3, 1, attempt=attempt)) == [(3, EndCode.STALE_ATTEMPT)]
    assert rig.is_live(1)
    assert one(rig.open(4, 1, attempt=6), SendAccepted)


def test_other_tokens_under_the_same_id_are_refused() -> None:
    rig = ExportRig()
    rig.open(1, 1, 10)
    assert refusal(rig.open(2, 1, 9, attempt=2)) is EndCode.INVALID
    assert refusal(rig.open(2, 1, 10, attempt=2, outputs=1)) is EndCode.INVALID
    assert rig.export(1).stream_id == 1


def test_what_an_older_attempt_was_told_is_not_told_the_new_one() -> None:
    rig = ExportRig()
    rig.answers = False
    rig.open(1, 1)
    old = one(rig.compute(), ExportPages)
    new = one(rig.open(2, 1, attempt=2), ExportPages)
    assert rig.exported(old) == []
    assert announced(rig.exported(new)) == [(0, 3, 10)]


@pytest.mark.parametrize("reason", list(ReleaseReason))
def test_an_ended_id_is_remembered_for_at_least_the_lease(reason: ReleaseReason) -> None:
    rig = ExportRig(handoff=HandoffConfig(lease_seconds=100.0))
    rig.open(1, 1)
    rig.compute()
    rig.release(1, reason)
    rig.now += 100.0
    assert refusal(rig.open(2, 1, attempt=9)) is EndCode.STALE_ATTEMPT
    rig.now += 1000.0
    assert one(rig.open(3, 1, attempt=9), SendAccepted)


# ---- rule 2: release or lease -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(ReleaseReason))
@pytest.mark.parametrize("moment", ["waiting", "extending", "computed"])
def test_a_release_frees_at_once(reason: ReleaseReason, moment: str) -> None:
    rig = ExportRig(scheduler=SchedulerConfig(budget_tokens=4))
    rig.open(1, 1, 10)
    if moment == "extending":
        rig.plan()
    if moment == "computed":
        rig.compute()
    assert end_codes(rig.release(1, reason)) == [(1, EndCode.OK)]
    assert not rig.is_live(1)
    while rig.in_flight:
        rig.resolve()
    assert rig.plan() == ()
    assert rig.scheduler.idle
    assert rig.num_free == 32
    assert rig.scheduler.load(0.0).leases_started == 0


@pytest.mark.parametrize("moment", ["extending", "computed"])
def test_any_other_end_starts_the_lease(moment: str) -> None:
    """An EOF is no Release: the decode worker may be dead, and another one may attach."""
    rig = ExportRig(handoff=LEASE, scheduler=SchedulerConfig(budget_tokens=4))
    rig.open(1, 1, 10)
    rig.plan()
    rig.resolve()
    if moment == "computed":
        rig.compute()
    assert rig.lose(1) == []
    assert rig.scheduler.load(0.0).leased_handoffs == 1
    rig.compute()
    assert rig.export(1).request.state is State.HANDING_OFF, "computing goes on"
    rig.wait(0.9)
    assert rig.is_live(1)
    effects = rig.wait(0.1)
    assert not rig.is_live(1)
    assert one(effects, Revoke).handoff_id == handoff_id(1)
    assert rig.num_free == 32
    assert rig.scheduler.load(0.0).leases_expired == 1


def test_attaching_within_the_lease_ends_it() -> None:
    rig = ExportRig(handoff=LEASE)
    rig.open(1, 1)
    rig.compute()
    rig.lose(1)
    rig.wait(0.5)
    assert announced(rig.open(2, 1, attempt=2, importer=b"another")) == [(0, 3, 10)]
    rig.wait(10.0)
    assert rig.is_live(1)
    rig.lose(2)
    rig.wait(0.9)
    assert rig.is_live(1), "a lease of its own"
    rig.wait(0.2)
    assert not rig.is_live(1)


def test_the_prefills_own_deadline_frees_at_once() -> None:
    rig = ExportRig()
    rig.open(1, 1, timeout_seconds=2.0)
    rig.compute()
    assert end_codes(rig.wait(2.0)) == [(1, EndCode.DEADLINE)]
    assert rig.scheduler.idle
    assert rig.num_free == 32


def test_the_end_of_a_drain_ends_hand_offs() -> None:
    rig = ExportRig()
    rig.open(1, 1)
    rig.open(2, 2)
    rig.lose(2)
    rig.send(Drain(1.0))
    assert end_codes(rig.wait(1.0)) == [(1, EndCode.DRAINING)]
    assert rig.scheduler.finished()


# ---- pages and the transfer process -------------------------------------------------------------------------------


def test_pages_are_freed_only_when_the_revocation_is_acknowledged() -> None:
    rig = ExportRig(prefix_cache=False)
    rig.open(1, 1)
    rig.compute()
    rig.answers = False
    revoke = one(rig.release(1), Revoke)
    assert rig.num_free == 29
    assert refusal(rig.open(2, 1, attempt=2)) is EndCode.STALE_ATTEMPT
    rig.answers = True
    rig.send(Revoked(b"unknown"))
    assert rig.num_free == 29
    rig.send(Revoked(revoke.handoff_id))
    assert rig.num_free == 32


def test_a_lost_transfer_process_proves_revocations_and_ends_streams() -> None:
    rig = ExportRig(handoff=LEASE, prefix_cache=False)
    for number in (1, 2):
        rig.open(number, number)
    rig.compute()
    rig.answers = False
    rig.release(1)
    effects = rig.send(TransferLost())
    assert rig.num_free == 29
    assert end_codes(effects) == [(2, EndCode.LOST)]
    assert rig.export(2).is_leased
    assert rig.open(3, 2, attempt=2) == [], "accepted once there is somebody to serve the pages"
    rig.answers = True
    effects = rig.transfer_ready()
    assert one(effects, SendAccepted).stream_id == 3
    assert announced(effects) == [(0, 3, 10)]
    assert one(effects, SendFirstToken)
    assert rig.scheduler.load(0.0).computed_tokens == 20


def test_without_a_transfer_process_nothing_needs_to_be_revoked() -> None:
    rig = ExportRig(ready=False)
    rig.open(1, 1)
    rig.compute()
    assert of_type(rig.release(1), Revoke) == []
    assert rig.scheduler.idle


def test_slots_are_for_what_is_computed() -> None:
    """A decode worker that stands still must not fill the prefill worker with small hand-offs."""
    rig = ExportRig(scheduler=SchedulerConfig(max_running_requests=1), handoff=HandoffConfig(importer_share=1.0))
    for number in range(1, 5):
        rig.open(number, number, 4)
        rig.compute()
    assert [rig.export(number).request.state for number in range(1, 5)] == [State.HANDING_OFF] * 4
    load = rig.scheduler.load(0.0)
    assert (load.running_requests, load.waiting_requests, load.transfers_inflight) == (4, 0, 4)

"""Prefill's side of a hand-off: create, announce, release, lease, attach. Rules 2 to 5 of docs/architecture.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.config import HandoffConfig, SchedulerConfig
from tandem.core.messages.handoff import (
    EndCode,
    EndStream,
    RankEndpoint,
    ReleaseReason,
    SendAccepted,
    SendAnnounce,
    SendComplete,
    SendFirstToken,
)
from tandem.core.messages.plans import Row
from tandem.core.messages.requests import Drain
from tandem.core.messages.sampling import SamplingParams
from tandem.core.messages.transfer import Export as ExportPages
from tandem.core.messages.transfer import Revoke, Revoked, TransferLost
from tandem.core.states import State
from tandem.core.token_ids import unpack
from tests.core.export_rig import ENDPOINT, ExportRig, end_codes, handoff_id, refusal
from tests.core.rig import of_type, one, prompt_of

LEASE = HandoffConfig(lease_seconds=1.0)


def announced(effects: list[object]) -> list[tuple[int, int, int]]:
    """(first ordinal, pages, tokens ready) of each announcement."""
    found = [effect.announce for effect in of_type(effects, SendAnnounce)]
    return [(one.first_ordinal, len(one.ranks[0].checksums) // 8, one.tokens_ready) for one in found]


# ---- calm ---------------------------------------------------------------------------------------------------------


def test_a_hand_off_from_open_to_release() -> None:
    rig = ExportRig(scheduler=SchedulerConfig(budget_tokens=4))
    accepted = one(rig.open(1, 1, 10), SendAccepted).accepted
    assert (accepted.endpoints, accepted.checksum, accepted.numerics) == ((ENDPOINT,), "xxh3-64", "exact")
    effects = rig.compute()
    assert announced(effects) == [(0, 1, 4), (1, 1, 8), (2, 1, 10)]
    assert one(effects, SendFirstToken).first_token.token_id == 10
    order = [type(effect) for effect in effects if not isinstance(effect, ExportPages)]
    assert order == [SendAnnounce, SendAnnounce, SendFirstToken, SendAnnounce, SendComplete]
    assert rig.export(1).request.state is State.HANDING_OFF
    assert rig.plan() == (), "decode rows are never planned for what is handed off"
    effects = rig.release(1)
    assert end_codes(effects) == [(1, EndCode.OK)]
    assert one(effects, Revoke).handoff_id == handoff_id(1)
    assert rig.scheduler.idle
    assert rig.num_free == 32


def test_unused_slots_of_the_last_page_are_zeroed() -> None:
    rig = ExportRig(scheduler=SchedulerConfig(budget_tokens=4))
    rig.open(1, 1, 10)
    assert [row.zero_tail for row in planned(rig)] == [False, False, True]
    rig.open(2, 2, 8)
    assert [row.zero_tail for row in planned(rig)] == [False, False]


def planned(rig: ExportRig) -> list[Row]:
    found: list[Row] = []
    while rows := rig.plan():
        found += rows
        rig.resolve()
    return found


def test_each_export_carries_the_attempts_secret() -> None:
    rig = ExportRig(scheduler=SchedulerConfig(budget_tokens=4))
    token = one(rig.open(1, 1, 10), SendAccepted).accepted.handoff_token
    exports = of_type(rig.compute(), ExportPages)
    assert [(export.first_ordinal, len(export.pages), export.token) for export in exports] == [
        (0, 1, token),
        (1, 1, token),
        (2, 1, token),
    ]
    assert [page for export in exports for page in export.pages] == rig.export(1).pages


def test_nothing_is_announced_before_it_is_hashed() -> None:
    rig = ExportRig()
    rig.answers = False
    rig.open(1, 1, 10)
    effects = rig.compute()
    assert announced(effects) == []
    assert one(effects, SendFirstToken)
    assert not of_type(effects, SendComplete)
    assert announced(rig.exported(one(effects, ExportPages))) == [(0, 3, 10)]


def test_what_the_prefix_cache_has_is_announced_at_once() -> None:
    rig = ExportRig(scheduler=SchedulerConfig(budget_tokens=4))
    rig.open(1, 1, prompt_of(10))
    rig.compute()
    rig.release(1)
    rig.open(2, 2, prompt_of(12))
    rig.plan()
    effects = rig.resolve()
    assert announced(rig.heard)[-2:] == [(0, 2, 8), (2, 1, 12)]
    assert one(effects, SendFirstToken).first_token.cached_tokens == 8


def test_a_held_prefix_is_not_announced_but_pinned() -> None:
    rig = ExportRig(scheduler=SchedulerConfig(budget_tokens=4))
    rig.open(1, 1, 10, held=8)
    effects = rig.compute()
    assert announced(effects) == [(2, 1, 10)]
    assert of_type(effects, SendComplete)
    assert rig.num_pinned == 3


def test_page_numbers_are_told_to_one_sided_importers_only() -> None:
    one_sided = RankEndpoint(transport="mooncake-tcp", address="session", instance_id=b"x")
    for endpoint, expected in ((ENDPOINT, False), (one_sided, True)):
        rig = ExportRig(ready=False)
        rig.transfer_ready(endpoint)
        rig.open(1, 1, 10, transports=(endpoint.transport,))
        (rank,) = one(rig.compute(), SendAnnounce).announce.ranks
        assert bool(rank.page_numbers) == expected
        if expected:
            assert unpack(rank.page_numbers) == rig.export(1).pages


def test_a_resumed_request_samples_the_next_index() -> None:
    rig = ExportRig()
    rig.open(1, 1, 10, outputs=2)
    (row,) = rig.plan()
    assert row.sample is not None
    assert row.sample.output_index == 2


# ---- refusals -----------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[EndCode, Callable[[ExportRig], list[object]]]] = {
    "fingerprint": (EndCode.MISMATCH, lambda rig: rig.open(1, 1, fingerprint="other")),
    "checksum": (EndCode.MISMATCH, lambda rig: rig.open(1, 1, checksums=("crc",))),
    "transport": (EndCode.MISMATCH, lambda rig: rig.open(1, 1, transports=("pigeon",))),
    "empty": (EndCode.INVALID, lambda rig: rig.open(1, 1, 0)),
    "too long": (EndCode.INVALID, lambda rig: rig.open(1, 1, 96)),
    "a cut token": (EndCode.INVALID, lambda rig: rig.open(1, 1, prompt_token_ids=b"12345")),
    "only outputs": (EndCode.INVALID, lambda rig: rig.open(1, 1, 5, outputs=5)),
    "held too much": (EndCode.INVALID, lambda rig: rig.open(1, 1, 8, held=8)),
    "held half a page": (EndCode.INVALID, lambda rig: rig.open(1, 1, 8, held=2)),
    "held less than nothing": (EndCode.INVALID, lambda rig: rig.open(1, 1, 8, held=-4)),
    "scoring": (EndCode.INVALID, lambda rig: rig.open(1, 1, sampling=SamplingParams(max_tokens=0))),
}


@pytest.mark.parametrize("what", list(REFUSALS))
def test_refused(what: str) -> None:
    code, act = REFUSALS[what]
    rig = ExportRig()
    effects = act(rig)
    assert end_codes(effects) == [(1, code)]
    assert one(effects, EndStream).message
    assert rig.scheduler.idle


def test_other_numerics_and_sharding_are_no_refusal() -> None:
    assert one(ExportRig().open(1, 1, numerics="other"), SendAccepted)


def test_a_full_queue_is_overload() -> None:
    rig = ExportRig(scheduler=SchedulerConfig(max_waiting_requests=2))
    rig.open(1, 1)
    rig.open(2, 2)
    assert refusal(rig.open(3, 3)) is EndCode.OVERLOADED
    assert one(rig.open(4, 2, attempt=2), SendAccepted), "what is here already may be attached to"


def test_draining_refuses_new_ids_and_lets_the_known_be_attached_to() -> None:
    rig = ExportRig()
    rig.open(1, 1)
    rig.send(Drain())
    assert refusal(rig.open(2, 2)) is EndCode.DRAINING
    assert end_codes(rig.open(3, 1, attempt=2)) == [(1, EndCode.SUPERSEDED)]
    rig.compute()
    rig.release(3)
    assert rig.scheduler.finished()


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

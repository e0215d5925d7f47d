"""Prefill's side of a hand-off: create, announce, refuse. Rules 4 and 5 of docs/architecture.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.config import SchedulerConfig
from tandem.core.messages.handoff import (
    EndCode,
    EndStream,
    RankEndpoint,
    SendAccepted,
    SendAnnounce,
    SendComplete,
    SendFirstToken,
)
from tandem.core.messages.plans import Row
from tandem.core.messages.requests import Drain
from tandem.core.messages.sampling import SamplingParams
from tandem.core.messages.transfer import Export as ExportPages
from tandem.core.messages.transfer import Revoke
from tandem.core.states import State
from tandem.core.token_ids import unpack
from tests.core.export_rig import ENDPOINT, ExportRig, announced, end_codes, handoff_id, refusal
from tests.core.rig import of_type, one, prompt_of

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

"""Rule 7: what one importer may pin, and who goes first when prefill needs pages."""

from __future__ import annotations

from tandem.config import HandoffConfig, SchedulerConfig
from tandem.core.messages.transfer import Revoke, Revoked
from tandem.core.states import State
from tests.core.export_rig import ExportRig, handoff_id
from tests.core.rig import one, prompt_of

A, B = b"decode-a", b"decode-b"


def capped(share: float = 0.25, num_pages: int = 16, lease: float = 100.0) -> ExportRig:
    handoff = HandoffConfig(importer_share=share, lease_seconds=lease)
    return ExportRig(num_pages=num_pages, handoff=handoff, prefix_cache=False)


def started(rig: ExportRig, *numbers: int) -> list[bool]:
    return [rig.export(number).request.state is not State.WAITING for number in numbers]


# ---- the cap ------------------------------------------------------------------------------------------------------


def test_the_cap_is_of_each_importer_and_against_the_whole_prompt() -> None:
    rig = capped()  # 4 of 16 pages each
    rig.open(1, 1, 8, importer=A)
    rig.open(2, 2, 12, importer=A)
    rig.open(3, 3, 4, importer=A)
    rig.open(4, 4, 16, importer=B)
    rig.compute()
    assert started(rig, 1, 2, 3, 4) == [True, False, False, True], "3 comes after 2, of the same importer"
    rig.release(1)
    rig.compute()
    assert started(rig, 2, 3) == [True, True]


def test_an_importer_that_pins_nothing_may_have_one_beyond_the_cap() -> None:
    rig = capped()
    rig.open(1, 1, 40, importer=A)
    rig.open(2, 2, 4, importer=A)
    rig.compute()
    assert started(rig, 1, 2) == [True, False]
    rig.release(1)
    rig.compute()
    assert started(rig, 2) == [True]


def test_pages_on_their_way_back_count_as_pinned() -> None:
    rig = capped()
    rig.open(1, 1, 16, importer=A)
    rig.compute()
    rig.answers = False
    rig.release(1)
    rig.open(2, 2, 4, importer=A)
    assert rig.plan() == ()
    rig.send(Revoked(handoff_id(1)))
    assert rig.plan()


def test_attaching_moves_pins_even_above_the_cap() -> None:
    rig = capped()
    rig.open(1, 1, 16, importer=A)
    rig.open(2, 2, 16, importer=B)
    rig.compute()
    rig.open(3, 1, 16, attempt=2, importer=B)
    rig.open(4, 4, 4, importer=B)
    rig.open(5, 5, 16, importer=A)
    rig.compute()
    assert started(rig, 4, 5) == [False, True]
    rig.release(3)
    rig.release(2)
    rig.compute()
    assert started(rig, 4) == [True]


def test_attaching_before_the_pages_are_there_counts_for_who_gets_them() -> None:
    rig = capped()
    rig.open(1, 1, 16, importer=A)
    rig.compute()
    rig.open(2, 2, 4, importer=A)
    assert rig.plan() == ()
    rig.open(3, 2, 4, attempt=2, importer=B)
    assert rig.plan()
    rig.resolve()
    rig.release(1)
    rig.release(3)
    assert rig.scheduler.idle


# ---- leased hand-offs go first ------------------------------------------------------------------------------------


def leased(rig: ExportRig, *numbers: int, tokens: int = 16) -> None:
    """Computed hand-offs whose streams were lost, one after the other."""
    for number in numbers:
        rig.open(number, number, tokens, importer=bytes([number]))
    rig.compute()
    for number in numbers:
        rig.now += 0.1
        rig.lose(number)


def test_leased_hand_offs_go_first_the_longest_without_a_stream_first() -> None:
    rig = capped(1.0)
    leased(rig, 2, 1)
    rig.open(3, 3, 8, importer=A)
    rig.compute()
    rig.open(4, 4, 24, importer=B)  # 6 pages free, 6 wanted
    rig.compute()
    assert rig.is_live(1)
    assert rig.is_live(2)
    rig.open(5, 5, 12, importer=B)
    rig.compute()
    assert (rig.is_live(2), rig.is_live(1)) == (False, True)
    assert started(rig, 5) == [True]
    assert rig.scheduler.load(0.0).leases_expired == 1


def test_no_more_leases_are_taken_than_pages_are_lacking() -> None:
    """4 pages are free and 6 are wanted: what comes back of one lease is enough."""
    rig = capped(1.0)
    leased(rig, 1, 2, 3)
    rig.answers = False
    rig.open(4, 4, 24, importer=A)
    assert rig.plan() == rig.plan() == ()
    assert [rig.is_live(number) for number in (1, 2, 3)] == [False, True, True]
    rig.send(Revoked(handoff_id(1)))
    assert rig.plan()
    assert rig.is_live(2)


def test_no_lease_is_taken_while_launches_bring_enough_back() -> None:
    rig = capped(1.0)
    leased(rig, 1)
    rig.open(2, 2, 40, importer=A)
    rig.plan()
    rig.release(2)
    rig.open(3, 3, 40, importer=A)
    assert rig.plan() == ()
    assert rig.is_live(1)
    rig.resolve()
    assert rig.plan()
    assert rig.is_live(1)


def test_a_leased_prompt_in_computation_may_go_too() -> None:
    rig = ExportRig(
        num_pages=8,
        scheduler=SchedulerConfig(budget_tokens=4),
        handoff=HandoffConfig(lease_seconds=100.0),
    )
    rig.open(1, 1, 24, importer=A)
    rig.plan()
    rig.resolve()
    rig.lose(1)
    rig.plan()
    rig.open(2, 2, 16, importer=B)
    rig.resolve()
    rig.compute()
    assert not rig.is_live(1)
    assert started(rig, 2) == [True]
    assert rig.num_pinned == 4


def test_a_shared_prefix_survives_the_lease_of_one() -> None:
    rig = ExportRig(handoff=HandoffConfig(lease_seconds=1.0))
    for number in (1, 2):
        rig.open(number, number, prompt_of(10), importer=bytes([number]))
        rig.compute()
    shared = rig.export(1).pages[:2]
    assert rig.export(2).pages[:2] == shared
    rig.lose(1)
    effects = rig.wait(1.0)
    assert one(effects, Revoke)
    assert all(rig.scheduler.kv.pool.references(page) == 2 for page in shared), "of the request and of its hand-off"
    rig.release(2)
    assert rig.num_free == 32

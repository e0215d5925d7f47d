"""The idle self-check finds every kind of wrong page, says so with its history, and never kills a serving worker."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.config import SchedulerConfig
from tandem.core.messages.requests import Cancel
from tandem.core.pages import PagePool
from tests.core.export_rig import ExportRig
from tests.core.import_rig import ImportRig, peer
from tests.core.rig import Rig, prompt_of


def busy_rig() -> Rig:
    """One request decodes in pages 0 and 1, one page more is cached."""
    rig = Rig(checks=False)
    rig.submit(1, 5, 20)
    rig.step()
    assert rig.request(1).pages == [0, 1]
    assert rig.scheduler.self_check() == []
    return rig


def test_a_leaked_page_goes_to_quarantine_for_good() -> None:
    rig = busy_rig()
    pool = rig.scheduler.kv.pool
    pool.allocate(1)
    (fault,) = rig.scheduler.self_check()
    assert "page 2: 1 references, 0 known owners" in fault
    assert "allocated@1" in fault
    assert rig.scheduler.self_check() == [], "said once"
    assert rig.scheduler.load(0.0).orphaned_pages == 1
    assert rig.scheduler.load(0.0).self_check_faults == 1
    rig.run()
    assert pool.counts().quarantined == 1
    assert 2 not in pool.free_pages()


def test_a_leaked_page_of_the_tree_is_not_found_any_more() -> None:
    rig = busy_rig()
    node = rig.scheduler.kv.tree.nodes()[0]
    rig.run()
    rig.scheduler.kv.pool.acquire([node.page])
    assert len(rig.scheduler.self_check()) == 1
    assert node.page not in [found.page for found in rig.scheduler.kv.tree.nodes()]
    rig.submit(2, 5, 20)
    assert rig.plan()[0].start == 0
    rig.run()
    assert rig.scheduler.self_check() == []


@pytest.mark.parametrize("page", [0, 1])
def test_a_page_that_lost_a_reference_is_given_back_to_its_owner(page: int) -> None:
    """Otherwise somebody else gets it, and its owner's release brings the worker down."""
    rig = busy_rig()
    rig.scheduler.kv.release([page])
    (fault,) = rig.scheduler.self_check()
    assert f"page {page}: 0 references, 1 known owners" in fault
    assert rig.scheduler.kv.pool.references(page) == 1
    assert page not in rig.scheduler.kv.pool.free_pages()
    assert rig.scheduler.self_check() == []
    rig.run()
    assert rig.num_free == 32
    assert rig.scheduler.self_check() == []


def test_a_reference_too_many_of_a_page_in_use_is_taken_back() -> None:
    rig = busy_rig()
    rig.scheduler.kv.pool.acquire([1])
    (fault,) = rig.scheduler.self_check()
    assert "page 1: 2 references, 1 known owners" in fault
    rig.run()
    assert rig.num_free == 32
    assert rig.scheduler.self_check() == []


def twice_on_the_free_list(pool: PagePool) -> None:
    pool._free.append(pool._free[0])


def lost_from_the_free_list(pool: PagePool) -> None:
    pool._free.pop()


def free_but_in_use(pool: PagePool) -> None:
    pool._free.append(0)


def busy_for_nobody(pool: PagePool) -> None:
    pool._busy[1] = 1


def in_no_tree(pool: PagePool) -> None:
    pool._in_tree[1] = 1


def miscounted_as_held(pool: PagePool) -> None:
    pool._num_held += 1


def miscounted_as_cached(pool: PagePool) -> None:
    pool._num_cached += 1


@pytest.mark.parametrize(
    "plant",
    [
        twice_on_the_free_list,
        lost_from_the_free_list,
        free_but_in_use,
        busy_for_nobody,
        in_no_tree,
        miscounted_as_held,
        miscounted_as_cached,
    ],
)
def test_what_does_not_add_up_is_found(plant: Callable[[PagePool], None]) -> None:
    rig = busy_rig()
    plant(rig.scheduler.kv.pool)
    assert rig.scheduler.self_check()


def exporting() -> ExportRig:
    """A computed hand-off of three pages, pinned; its request has its own reference of each."""
    rig = ExportRig(checks=False)
    rig.open(1, 1)
    rig.compute()
    assert rig.scheduler.self_check() == [] and rig.num_pinned == 3
    return rig


def test_a_pin_that_a_hand_off_lost_is_given_back() -> None:
    rig = exporting()
    page = rig.export(1).pages[0]
    while rig.scheduler.kv.pool.references(page):
        rig.scheduler.kv.pool.release([page])
    (fault, *_) = rig.scheduler.self_check()
    assert f"page {page}: 0 references" in fault
    assert rig.scheduler.self_check() == [] and page not in rig.scheduler.kv.pool.free_pages()
    rig.release(1)
    assert rig.scheduler.self_check() == [] and rig.num_free == 32


def test_pages_of_a_hand_off_that_was_forgotten_are_orphans() -> None:
    rig = exporting()
    export = rig.export(1)
    lost = list(export.pages)
    export.pages = []
    faults = rig.scheduler.self_check()
    assert [fault.split(":")[0] for fault in faults] == [f"page {page}" for page in sorted(lost)]
    assert rig.scheduler.self_check() == [], "said once, or owned by the request"
    assert not set(lost) & set(rig.scheduler.kv.pool.free_pages())


def test_a_cached_page_that_the_tree_lost_is_found() -> None:
    rig = busy_rig()
    rig.run()
    assert rig.scheduler.kv.pool.counts().cached
    rig.scheduler.kv.tree.forget(rig.scheduler.kv.tree.nodes()[0].page)
    assert any("in the tree" in fault for fault in rig.scheduler.self_check())


def receiving() -> ImportRig:
    """A request whose three pages are read, none of them is here yet."""
    rig = ImportRig(checks=False)
    rig.submit(1, 10, peers=(peer(1),))
    rig.accept(1)
    rig.announce(1, 0, 3)
    assert rig.scheduler.self_check() == [] and len(rig.request(1).pages) == 3
    return rig


def test_a_read_that_was_taken_for_over_is_found() -> None:
    """Else its page could be given to somebody else while it is written to."""
    rig = receiving()
    rig.scheduler.kv.pool.clear_busy([rig.request(1).pages[1]])
    (fault,) = rig.scheduler.self_check()
    assert "under a read is 0, must be 1" in fault


def test_a_read_that_nobody_ends_is_found() -> None:
    rig = receiving()
    importer = rig.scheduler._importer
    assert importer is not None
    importer._book.tickets.clear()
    assert all("under a read is 1, must be 0" in fault for fault in rig.scheduler.self_check())


# ---- false alarms -------------------------------------------------------------------------------------------------


def test_pages_under_a_lease_are_no_fault() -> None:
    rig = exporting()
    rig.lose(1)
    assert rig.scheduler.load(rig.now).leased_handoffs == 1
    assert rig.scheduler.self_check() == []
    assert rig.scheduler.kv.pool.counts().held == 3


def test_a_held_prefix_is_no_fault() -> None:
    """Pinned from Open on, though the request owns no page of its own yet."""
    rig = ImportRig(checks=False)
    rig.submit(1, 9, 1)
    rig.run()
    rig.submit(2, prompt_of(9, 100), 4, peers=(peer(1),))
    assert len(rig.request(2).pages) == 2, "held"
    assert rig.scheduler.self_check() == []
    assert rig.scheduler.kv.pool.counts().held == 2


def test_several_launches_in_flight_are_no_fault() -> None:
    rig = Rig(checks=False, stages=3, scheduler=SchedulerConfig(microbatch_tokens_min=4))
    rig.submit(1, 30, 4)
    rig.submit(2, 30, 4)
    while len(rig.in_flight) < 3 and rig.plan():
        assert rig.scheduler.self_check() == []
    rig.send(Cancel(1))
    assert rig.scheduler.kv.pool.counts().quarantined > 0, "launches in flight may still write there"
    assert rig.scheduler.self_check() == []
    rig.run()
    assert rig.scheduler.self_check() == [] and rig.num_free == 32


def test_orphans_in_quarantine_are_no_fault_again() -> None:
    rig = busy_rig()
    rig.scheduler.kv.pool.allocate(3)
    assert len(rig.scheduler.self_check()) == 3
    rig.run()
    for _ in range(2):
        assert rig.scheduler.self_check() == []
    assert rig.scheduler.load(0.0).orphaned_pages == 3


def test_pages_under_a_launch_or_a_read_are_no_fault() -> None:
    rig = ImportRig()
    rig.submit(1, 10, peers=(peer(1),))
    rig.accept(1)
    rig.announce(1, 0, 3)
    rig.send(Cancel(1))
    rig.submit(2, 10)
    rig.plan()
    rig.send(Cancel(2))
    assert rig.scheduler.kv.pool.counts().quarantined == 6
    assert rig.scheduler.self_check() == []


def test_pins_of_hand_offs_are_known_owners() -> None:
    rig = ExportRig()
    rig.open(1, 1)
    rig.compute()
    rig.answers = False
    rig.release(1)
    assert rig.num_pinned == 3
    assert rig.scheduler.self_check() == []

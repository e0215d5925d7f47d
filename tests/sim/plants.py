"""Faults to be planted in the scheduler; each docstring is the promise that it breaks. Nothing here is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tandem.core.exporter import Exporter
from tandem.core.importer import Importer
from tandem.core.kv_cache import KvCache
from tandem.core.ledger import Ledger
from tandem.core.messages.handoff import ReleaseReason, ReleaseReceived, SendRelease, StreamLost
from tandem.core.messages.plans import Row
from tandem.core.messages.transfer import PullEnded, PullStatus
from tandem.core.microbatches import UNDIVIDED, Microbatches
from tandem.core.pages import PagePool
from tandem.core.planner import Planner
from tandem.core.radix import Node, PrefixTree
from tandem.core.scheduler import Scheduler
from tandem.core.sharding import KvPart

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]
PLANTS: dict[str, Fault] = {}
SLICE_OF: dict[str, str] = {}  # the part of the promises that a fault breaks: see slices.py


def plant(part: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        PLANTS[function.__name__] = function
        SLICE_OF[function.__name__] = part
        return function

    return register


# ---- pages --------------------------------------------------------------------------------------------------------


@plant("pages")
def freed_without_a_fence(patch: Patch) -> None:
    """A page returns to the free list only after the launches before its release."""
    patch.setattr(PagePool, "_retire", lambda self, page: None if self._busy[page] else self._to_free(page))


@plant("pages")
def evicted_without_a_fence(patch: Patch) -> None:
    """A cached page is evicted only after the launches before its release."""
    original = PrefixTree.released

    def released(self: PrefixTree, pages: list[int]) -> None:
        original(self, pages)
        for page in pages:
            self._nodes[page].fence = 0

    patch.setattr(PrefixTree, "released", released)


@plant("reads")
def busy_pages_reused(patch: Patch) -> None:
    """Pages under a read are quarantined until the read is proven over."""

    def stop_pulls(self: Importer, imp: Any) -> None:
        for number, ticket in list(self._book.tickets.items()):
            if ticket.owner is imp:
                self._ledger.kv.pool.clear_busy(self._book.tickets.pop(number).pages)
        imp.generation += 1

    patch.setattr(Importer, "_stop_pulls", stop_pulls)


@plant("reads")
def pull_ended_is_no_proof(patch: Patch) -> None:
    """The end of a pull clears its pages, whoever they belonged to."""
    original = Importer.pull_ended

    def pull_ended(self: Importer, event: PullEnded, now: float) -> None:
        ticket = self._book.tickets.get(event.ticket)
        if ticket is None or ticket.is_current:
            original(self, event, now)

    patch.setattr(Importer, "pull_ended", pull_ended)


@plant("exports")
def freed_before_the_revocation_is_acknowledged(patch: Patch) -> None:
    """Exported pages are freed only when the transfer process serves them no longer."""
    original = Exporter._finish

    def finish(self: Exporter, export: Any, reason: Any) -> None:
        original(self, export, reason)
        if self._book.revoking.pop(export.handoff_id, None) is not None:
            self._unpin(export)

    patch.setattr(Exporter, "_finish", finish)


@plant("prefixes")
def a_child_under_somebody_elses_page(patch: Patch) -> None:
    """A page enters the tree only below its own request's path."""
    original = PrefixTree.insert

    def insert(self: PrefixTree, parent: Node | None, salt: str, key: tuple[int, ...], page: int) -> Node | None:
        root = self._roots.get(salt) if parent is None else parent
        there = root.children.get(key) if root is not None else None
        return there if there is not None else original(self, parent, salt, key, page)

    patch.setattr(PrefixTree, "insert", insert)


@plant("exports")
def a_hand_off_that_made_room_keeps_its_row(patch: Patch) -> None:
    """What gives its pages up while a plan is made has no row in it."""

    def plan(self: Planner, now: float) -> Any:
        planned = self._rows(now)
        rows, owners = tuple(row for row, _ in planned), tuple(owner for _, owner in planned)
        return self._launch(rows, owners) if rows else None

    patch.setattr(Planner, "plan", plan)


@plant("resumptions")
def resumed_output_without_pages(patch: Patch) -> None:
    """A resumed request's output may reach beyond the pages that are handed over."""

    def smaller(*values: Any, **options: Any) -> Any:
        return values[0] if len(values) == 2 and not options else max(*values, **options)

    patch.setattr("tandem.core.importer.max", smaller, raising=False)


@plant("pages")
def a_double_release(patch: Patch) -> None:
    """A reference is dropped once."""
    original = KvCache.release_request

    def release_request(self: KvCache, request: Any) -> None:
        pages = list(request.pages)
        original(self, request)
        self.release(pages)

    patch.setattr(KvCache, "release_request", release_request)


@plant("prefixes")
def an_unpinned_prefix(patch: Patch) -> None:
    """A held prefix is pinned from Open on."""
    original = Importer.submit

    def submit(self: Importer, request: Any, now: float) -> None:
        original(self, request, now)
        self._ledger.kv.release(request.pages)

    patch.setattr(Importer, "submit", submit)


@plant("exports")
def half_a_reservation(patch: Patch) -> None:
    """A prompt is admitted only when all of its pages are there."""
    original = Planner._start

    def start(self: Planner, request: Any, now: float) -> bool:
        started = original(self, request, now)
        half = len(request.pages) // 2
        if started and half:
            self._ledger.kv.release(request.pages[half:])
            request.set_pages(request.pages[:half])
        return started

    patch.setattr(Planner, "_start", start)


# ---- hand-off -----------------------------------------------------------------------------------------------------


@plant("exports")
def a_lost_stream_is_a_release(patch: Patch) -> None:
    """EOF is no Release."""

    def stream_lost(self: Exporter, event: StreamLost, now: float) -> None:
        self.released(ReleaseReceived(event.stream_id, ReleaseReason.DONE), now)

    patch.setattr(Exporter, "stream_lost", stream_lost)


@plant("exports")
def a_lost_release(patch: Patch) -> None:
    """Decode ends every stream with a Release."""
    original = Ledger.emit

    def emit(self: Ledger, effect: object) -> None:
        if not isinstance(effect, SendRelease):
            original(self, effect)

    patch.setattr(Ledger, "emit", emit)


@plant("exports")
def a_partial_page_announced(patch: Patch) -> None:
    """Only the last announced page may be partial: nothing writes to an announced page."""
    original = Exporter.computed

    def computed(self: Exporter, request: Any, now: float) -> None:
        export = self._book.of(request)
        export.computed = self._settings.pages_for(request.num_computed)
        self._export(export)
        original(self, request, now)

    patch.setattr(Exporter, "computed", computed)


@plant("exports")
def slots_not_zeroed(patch: Patch) -> None:
    """Unused slots of the last page are zero."""
    original = Planner._extend_row

    def extend_row(self: Planner, request: Any, left: int, room: float) -> Row:
        return replace(original(self, request, left, room), zero_tail=False)

    patch.setattr(Planner, "_extend_row", extend_row)


@plant("caps")
def the_cap_ignored(patch: Patch) -> None:
    """Pages that one importer may pin are bounded."""
    patch.setattr(Exporter, "first_startable", lambda self, waiting: waiting[0] if waiting else None)


@plant("caps")
def the_cap_of_what_is_pinned_only(patch: Patch) -> None:
    """The cap is checked against the whole prompt."""

    def first_startable(self: Exporter, waiting: Any) -> Any:
        return next((one for one in waiting if self._book.pinned(self._book.of(one).importer) < self._cap_pages), None)

    patch.setattr(Exporter, "first_startable", first_startable)


@plant("attempts")
def a_lower_attempt_accepted(patch: Patch) -> None:
    """Attempts are ordered: an older one that comes late takes nothing over."""
    original = Exporter._refusal

    def refusal(self: Exporter, open_: Any, now: float) -> Any:
        export = self._book.live.get(open_.handoff_id)
        return None if export is not None else original(self, open_, now)

    patch.setattr(Exporter, "_refusal", refusal)


@plant("reads")
def a_mismatch_accepted(patch: Patch) -> None:
    """Pages are used only after their checksums matched."""
    original = Importer.pull_ended

    def pull_ended(self: Importer, event: PullEnded, now: float) -> None:
        if event.status is PullStatus.MISMATCH:
            good = (*event.good_ordinals, *event.bad_ordinals)
            event = replace(event, status=PullStatus.DONE, good_ordinals=good, bad_ordinals=())
        original(self, event, now)

    patch.setattr(Importer, "pull_ended", pull_ended)


@plant("reads")
def not_landed_pages_used(patch: Patch) -> None:
    """Decoding starts only when every page is here."""
    patch.setattr("tandem.core.imports.Import.is_landed", property(lambda self: bool(self.landed)))


@plant("first tokens")
def streams_left_behind(patch: Patch) -> None:
    """Decode ends every stream that it opened."""
    original = Importer._close_attempt

    def close_attempt(self: Importer, imp: Any) -> None:
        self._book.forget_stream(imp)
        original(self, imp)

    patch.setattr(Importer, "_close_attempt", close_attempt)


# ---- ranks --------------------------------------------------------------------------------------------------------


@plant("ranks")
def wrong_head_range(patch: Patch) -> None:
    """A piece is the same heads at both of its ends."""
    original = KvPart.within

    def within(self: KvPart, whole: KvPart) -> KvPart:
        own = original(self, whole)
        return replace(own, first_head=(own.first_head + own.num_heads) % whole.num_heads)

    patch.setattr(KvPart, "within", within)


# ---- stages -------------------------------------------------------------------------------------------------------


@plant("stages")
def a_plan_takes_all_rows(patch: Patch) -> None:
    """A plan of a pipeline takes its share only."""
    patch.setattr(Microbatches, "share", lambda self, decode, prompts: UNDIVIDED)


# ---- ends ---------------------------------------------------------------------------------------------------------


@plant("ends")
def a_lost_cancel(patch: Patch) -> None:
    """A cancel ends its request at once."""
    patch.setattr(Scheduler, "_cancel", lambda self, event, now: None)


@plant("ends")
def deadlines_ignored(patch: Patch) -> None:
    """A request ends when its deadline passes."""
    original = Ledger.enter

    def enter(self: Ledger, request: Any) -> None:
        deadline, request.deadline = request.deadline, None
        original(self, request)
        request.deadline = deadline

    patch.setattr(Ledger, "enter", enter)


@plant("ends")
def a_slot_never_given_back(patch: Patch) -> None:
    """Whoever stops running gives its slot back."""

    def stop_running(self: Ledger, request: Any) -> None:
        if request.slot >= 0:
            request.slot = -1
            self.running.remove(request)

    patch.setattr(Ledger, "stop_running", stop_running)


@plant("exports")
def leases_never_end(patch: Patch) -> None:
    """Orphaned hand-offs go when their lease is over."""
    patch.setattr(Exporter, "lease_due", lambda self, handoff_id, now: None)

"""Direct checks of one simulated worker, for what a token oracle alone does not see; and counts of what has happened.

A wrong page that is read by nobody yields right tokens. So each page that is given out, announced, or decoded upon is
looked at here, against what the device, the transfer process and the reference know, not the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tandem.core.messages import handoff
from tandem.core.messages.plans import Plan
from tandem.core.messages.requests import EndReason
from tandem.core.states import State
from tests.sim import oracle

if TYPE_CHECKING:
    from tests.sim.worker import SimWorker


class Watch:
    """Looks over a scheduler's shoulder: wraps a few of its methods, and is shown its plans and effects."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._seen = worker.world.seen
        self._sampled: set[tuple[int, int]] = set()
        self._discarded = 0  # rows in flight of those who have ended
        scheduler = worker.scheduler
        self._after(scheduler._ledger, "end", self._ended)
        self._after(scheduler.kv.pool, "allocate", self._allocated)
        self._after(scheduler._planner, "_retract", lambda *_: self._count("retraction"))
        if scheduler._importer is not None:
            self._after(scheduler._importer, "make_room", self._made_room)
            self._after(scheduler._importer, "_land", self._landed)
        if scheduler._exporter is not None:
            self._after(scheduler._exporter, "make_room", self._made_room)
            self._after(scheduler._exporter, "started", self._started)
            self._after(scheduler._exporter, "_attach", lambda *_: self._count("attach"))
            self._after(scheduler._exporter, "first_startable", self._chosen)

    def _after(self, owner: Any, name: str, look: Callable[..., None]) -> None:
        """Call `look(result, *arguments)` after each call of a method."""
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            look(result, *arguments, **named)
            return result

        setattr(owner, name, wrapped)

    def _count(self, what: str) -> None:
        self._seen[what] += 1

    def after_event(self) -> None:
        """Whoever holds a cached page holds the pages before it: else they would be evicted first."""
        references = self._worker.scheduler.kv.pool.tables().references
        for node in self._worker.scheduler.kv.tree.nodes():
            if node.parent is not None and node.parent.page >= 0 and references[node.page]:
                assert references[node.parent.page], f"page {node.page} is held, the one before it is not"

    def at_rest(self) -> None:
        """Every row without a use is counted."""
        counted = self._worker.scheduler._ledger.counters.discarded_rows
        assert counted == self._discarded, f"{counted} rows are counted as discarded, {self._discarded} were"

    # ---- plans ----------------------------------------------------------------------------------------------------

    def planned(self, plan: Plan) -> None:
        """No token is sampled twice, none that is known, and none past the end that is known."""
        assert self._worker.device.unresolved <= self._worker.depth, "more plans are in flight than the loop allows"
        for row in plan.rows:
            request = self._worker.scheduler._ledger.requests[row.request_id]
            assert request.samples_in_flight <= self._worker.chain, f"request {row.request_id} is drawn too far ahead"
            if not row.token_ids:
                self._count("speculative row")
            if row.sample is None:
                continue
            index = row.sample.output_index
            assert index >= request.num_outputs, f"the known output {index} of request {row.request_id} is drawn again"
            assert index < request.sampling.max_tokens, f"output {index} of {request.sampling.max_tokens}"
            assert request.num_prompt + index < self._worker.world.options.max_context
            key = row.request_id, index
            assert key not in self._sampled, f"output {index} of request {row.request_id} is drawn twice"
            self._sampled.add(key)

    def _ended(self, _: None, request: Any, reason: EndReason, now: float, **end: Any) -> None:
        """Rows are wasted only where the end could not be known; each kind of end has its bound.

        A stop that is not a token is the gateway's cancel, for a stop string.
        """
        most = self._worker.depth + 1
        if reason in (EndReason.LENGTH, EndReason.HANDED_OFF):
            most = 0
        elif end.get("stop_token_id") is not None:
            most = self._worker.chain - 1
        found = request.rows_in_flight
        assert found <= most, f"request {request.request_id} ended {reason.value} with {found} rows in flight"
        self._discarded += found

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _allocated(self, pages: list[int] | None, count: int) -> None:
        """A page is given out only when no launch, no read and no reader can touch it any more."""
        for page in pages or ():
            for plan_id, touched in self._worker.device.in_flight.items():
                assert page not in touched, f"page {page} is given out while plan {plan_id} is in flight"
            assert page not in self._worker.transfer.pages_written(), f"page {page} is given out while it is read into"
            assert page not in self._worker.transfer.pages_served(), f"page {page} is given out while it is announced"

    def _landed(self, _: None, imp: Any, now: float) -> None:
        """What is decoded upon is what the reference computes."""
        request = imp.request
        if request.state not in (State.DECODING, State.EXTENDING):
            return
        size, total = self._worker.world.options.page_tokens, 0
        for position in range(request.num_computed):
            value = oracle.slot_value(request.tokens[position], position, total)
            found = self._worker.pool[request.pages[position // size]][position % size]
            assert found == value, f"request {request.request_id}: slot {position} is not what was computed"
            total = oracle.add(total, value)
        if request.state is State.EXTENDING:
            self._count("resumed beyond the first Open")

    def announced(self, effect: handoff.SendAnnounce) -> None:
        """The unused slots of the last page are zero."""
        exporter = self._worker.scheduler._exporter
        assert exporter is not None
        export = exporter._book.by_stream(effect.stream_id)
        size = self._worker.world.options.page_tokens
        if export is not None and export.announced == export.total_pages and export.open_length % size:
            slots = self._worker.pool[export.pages[-1]][export.open_length % size :]
            assert not any(slots), f"unused slots hold {slots}"

    # ---- hand-offs ------------------------------------------------------------------------------------------------

    def expects(self, event: object) -> Callable[[], None] | None:
        """A stream that ends without a Release starts a lease, whatever it looks like. Return what to check then."""
        exporter = self._worker.scheduler._exporter
        if exporter is None or not isinstance(event, handoff.StreamLost):
            return None
        export = exporter._book.by_stream(event.stream_id)
        if export is None:
            return None
        ends = self._worker.world.now + self._worker.world.options.handoff.lease_seconds
        found = export

        def check() -> None:
            deadline = found.request.deadline
            if deadline is not None and deadline <= self._worker.world.now:
                return
            assert found.handoff_id in exporter._book.live, "a lost stream was taken for a Release"
            assert found.lease_until == ends, f"the lease ends at {found.lease_until}, not at {ends}"
            self._count("lease")
            self._worker.world.later(ends - self._worker.world.now + 0.001, over)

        def over() -> None:
            is_over = found.lease_until != ends or found.handoff_id not in exporter._book.live
            assert is_over or not self._worker.alive, "the lease is over, and the hand-off is still there"

        return check

    def _started(self, _: None, request: Any) -> None:
        """The cap, counted anew: of the whole prompts of one importer, those on their way back included."""
        exporter = self._worker.scheduler._exporter
        assert exporter is not None
        export = exporter._book.of(request)
        owners = [*exporter._book.live.values(), *exporter._book.revoking.values()]
        others = [one for one in owners if one.importer == export.importer and one.pages and one is not export]
        pinned = sum(other.total_pages for other in others)
        share = self._worker.world.options.handoff.importer_share
        cap = max(1, int(share * self._worker.world.options.prefill_pages))
        assert not pinned or pinned + export.total_pages <= cap, f"{pinned} + {export.total_pages} pages of {cap}"

    def _chosen(self, request: Any, waiting: Any) -> None:
        if waiting and request is not waiting[0]:
            self._count("skipped by the cap")

    def _made_room(self, made: bool, seq: int, missing: int) -> None:
        if made:
            self._count(f"made room on {self._worker.role}")

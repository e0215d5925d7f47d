"""Decode's side of the hand-off: requests that wait for pages of a prefill peer.

An import lives from the Submit that names peers until every page of its prompt is verified (or no peer is left, or
the request ends). It opens one stream at a time; every stream that it opened, it also ends. Pages are used only after
their checksums matched; a page is read again only when the earlier read into it is over. docs/architecture.md
section 2 has the rules; their numbers stand beside the code that keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.core.import_effects import open_stream, pull
from tandem.core.import_figures import FAILURE_OF, count_failure, count_landing, count_pull, note_numerics
from tandem.core.imports import Import, ImportBook
from tandem.core.ledger import Ledger
from tandem.core.messages.handoff import (
    DropStream,
    EndCode,
    ReleaseReason,
    SendRelease,
    StreamAccepted,
    StreamAnnounced,
    StreamClosed,
    StreamCompleted,
    StreamFirstToken,
)
from tandem.core.messages.requests import CancelCause, EndReason
from tandem.core.messages.transfer import CancelPull, PullEnded, PullStatus, TransferReady
from tandem.core.policy import Fences
from tandem.core.request import Request
from tandem.core.states import State, move

_TRIES_PER_PEER = 3  # pulling failed, then the stream of a transfer process that is gone; the third finds its successor


class Importer:
    """Implements the planner's Admission for the decode role."""

    def __init__(self, ledger: Ledger, fences: Fences) -> None:
        self._ledger = ledger
        self._settings = ledger.settings
        self._fences = fences
        self._book = ImportBook()
        self._transfer_ready = False
        self._transports: tuple[str, ...] = ()

    # ---- Admission: pages for prompts that are computed here ------------------------------------------------------

    def first_startable(self, waiting: Sequence[Request]) -> Request | None:
        """Prompts of failed hand-offs are computed here, a bounded number at once.

        None before the head of the receive queue, unless it arrived earlier: neither kind starves the other.
        """
        busy = sum(other.local_fallback and other.state is State.EXTENDING for other in self._ledger.running)
        for request in waiting:
            if not request.local_fallback or busy < self._settings.scheduler.max_local_prefills:
                return request if request.was_retracted or not self._queue_is_before(request) else None
        return None

    def _queue_is_before(self, request: Request) -> bool:
        queue = self._book.receive_queue
        return bool(queue) and queue[0].request.seq < request.seq

    def started(self, request: Request) -> None:
        """Nothing to do: the request owns its pages."""

    def computed(self, request: Request, now: float) -> None:
        """Nothing to do: nobody else waits for these pages."""

    def make_room(self, seq: int, missing: int) -> bool:
        """Rule 6: the youngest AWAITING request loses its held prefix and opens again with nothing held.

        Younger ones than `seq` first; older ones, too, before anybody is stuck: each can lose its pins only once.
        """
        pinning = [imp for imp in self._book.live() if imp.pins and imp.request.seq != seq]
        if not pinning:
            return False
        victim = max(pinning, key=lambda imp: imp.request.seq)
        self._close_attempt(victim)
        self._open(victim)
        victim.tries_of_peer -= 1  # the peer did nothing wrong
        return True

    # ---- the life of an import ------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> None:
        """Begin a request that names prefill peers, in its entry state AWAITING."""
        imp = self._book.add(request)
        if not self._next_peer(imp, now):
            self._compute_here(imp, now)
            return
        self._ledger.kv.attach_prefix(request, imp.num_tokens - 1)
        imp.held_pages = len(request.pages)
        self._open(imp)

    def cancel(self, request: Request, cause: CancelCause) -> None:
        """Let go of the hand-off of a request that ends now; the caller ends the request."""
        imp = self._book.of(request)
        if imp is None:
            return
        self._stop_pulls(imp)
        if imp.is_open:
            lost = cause is CancelCause.SESSION_LOST
            stream = imp.stream_id
            self._ledger.emit(DropStream(stream) if lost else SendRelease(stream, ReleaseReason.ABANDONED))
        self._book.remove(imp)

    def advance(self, now: float) -> None:
        """Give pages to the requests that have something to read, in the order of their first Announce."""
        ledger = self._ledger
        while self._book.receive_queue and ledger.has_slot:
            if ledger.waiting and ledger.waiting[0].was_retracted:
                return  # retracted requests go first
            if self.first_startable(ledger.waiting) is not None:
                return  # somebody who arrived earlier computes its prompt here
            imp = self._book.receive_queue[0]
            request = imp.request
            # A resumed request's output may reach beyond the pages that are handed over.
            need = self._settings.pages_for(max(imp.num_tokens, len(request.tokens))) - len(request.pages)
            spare = sum(other.state is State.DECODING for other in ledger.running)
            pages = ledger.kv.allocate(need, spare)
            while pages is None and (lacking := ledger.kv.shortage(need, spare)):
                if not self.make_room(request.seq, lacking):
                    break
                pages = ledger.kv.allocate(need, spare)
            if pages is None:
                return
            self._book.receive_queue.pop(0)
            request.set_pages(request.pages + pages)
            move(request, State.RECEIVING)
            ledger.run(request)
            if request.marks.started == 0.0:
                request.marks.started = now
                ledger.tallies.queue.observe(now - request.marks.queued)
            self._pull(imp, now)

    # ---- stream events --------------------------------------------------------------------------------------------

    def accepted(self, event: StreamAccepted, now: float) -> None:
        imp = self._book.by_stream(event.stream_id)
        if imp is None:
            return
        note_numerics(self._ledger, imp, event.accepted.numerics)
        if not imp.accept(event.accepted, self._transports, self._settings):
            count_failure(self._ledger, imp, "incompatible")
            self._give_up_peer(imp, now)

    def announced(self, event: StreamAnnounced, now: float) -> None:
        imp = self._book.by_stream(event.stream_id)
        if imp is None:
            return
        announce = event.announce
        if not imp.note_announce(announce):
            self._fault(imp, "protocol", now)
            self._give_up_peer(imp, now)
            return
        if imp.request.state is State.RECEIVING:
            self._pull(imp, now)
        elif not imp.queued:
            imp.queued = True
            imp.request.marks.queued = imp.request.marks.queued or now
            self._book.receive_queue.append(imp)

    def first_token(self, event: StreamFirstToken, now: float) -> None:
        """Rule 5: forward it at once; from then on it is a known token."""
        imp = self._book.by_stream(event.stream_id)
        if imp is None:
            return
        request, first = imp.request, event.first_token
        if not 0 <= first.token_id < self._settings.vocab_size:
            self._fault(imp, "protocol", now)
            self._give_up_peer(imp, now)
            return
        if request.num_outputs > imp.num_open_outputs:  # known since an earlier attempt: never taken again
            self._ledger.counters.first_token_differences += request.tokens[imp.num_tokens] != first.token_id
            return
        request.cached_tokens = max(request.cached_tokens, first.cached_tokens)
        request.marks.queue_seconds, request.marks.prefill_seconds = first.queue_seconds, first.prefill_seconds
        if first.prompt_logprobs and not request.prompt_logprobs:
            request.prompt_logprobs = list(first.prompt_logprobs)
        self._ledger.append_output(request, first.token_id, first.logprob, now)
        ending = self._ledger.stop_reason(request)
        if ending is None:
            self._land(imp, now)
            return
        self._stop_pulls(imp)
        self._ledger.emit(SendRelease(imp.stream_id, ReleaseReason.DONE))
        self._book.remove(imp)
        self._ledger.end(request, ending[0], now, stop_token_id=ending[1])

    def completed(self, event: StreamCompleted, now: float) -> None:
        imp = self._book.by_stream(event.stream_id)
        if imp is not None and imp.num_announced < imp.num_pages:
            self._fault(imp, "protocol", now)
            self._give_up_peer(imp, now)

    def closed(self, event: StreamClosed, now: float) -> None:
        """The stream is over. LOST after Accepted: the same peer may still hold the pages; else the next peer."""
        imp = self._book.by_stream(event.stream_id)
        if imp is None:
            return
        self._book.forget_stream(imp)
        if event.code is EndCode.LOST:
            self._fault(imp, "lost", now)
        else:
            count_failure(self._ledger, imp, FAILURE_OF[event.code])
        if event.code is EndCode.LOST and imp.accepted is not None:
            self._try_again(imp, now)
        else:
            self._give_up_peer(imp, now)

    # ---- transfer events ------------------------------------------------------------------------------------------

    def transfer_ready(self, event: TransferReady, now: float) -> None:
        self._transfer_ready = True
        self._transports = event.imports
        for imp in self._book.live():
            if imp.request.state is State.RECEIVING:
                self._pull(imp, now)

    def transfer_lost(self) -> None:
        """The transfer process is gone, so all its reads are over: what was asked for is asked for again."""
        self._transfer_ready = False
        for ticket in self._book.take_tickets():
            self._ledger.kv.pool.clear_busy(ticket.pages)
            if ticket.is_current:
                ticket.owner.pending.difference_update(ticket.ordinals)

    def pull_ended(self, event: PullEnded, now: float) -> None:
        ticket = self._book.tickets.pop(event.ticket, None)
        if ticket is None:
            return
        self._ledger.kv.pool.clear_busy(ticket.pages)
        count_pull(self._ledger, ticket, event)
        imp = ticket.owner
        if not ticket.is_current:
            return
        imp.pending.difference_update(ticket.ordinals)
        imp.landed.update(event.good_ordinals)
        imp.request.received_bytes += event.num_bytes
        imp.request.transport = event.transport or imp.request.transport
        imp.request.marks.pull_ended = now
        if event.status is PullStatus.DONE:
            self._land(imp, now)
        elif event.status is PullStatus.MISMATCH:
            self._mismatched(imp, set(event.bad_ordinals), now)
        else:
            self._fault(imp, "pull", now)
            self._try_again(imp, now)

    @property
    def num_pulling(self) -> int:
        return sum(imp.request.state is State.RECEIVING for imp in self._book.live())

    @property
    def num_queued(self) -> int:
        return len(self._book.receive_queue)

    @property
    def idle(self) -> bool:
        """Whether nothing is imported and no read is under way."""
        return not self._book.tickets and not self._book.live()

    def pages_under_read(self) -> list[int]:
        """Pages that a pull may still write into, for the self-check."""
        return [page for ticket in self._book.tickets.values() for page in ticket.pages]

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _open(self, imp: Import) -> None:
        """Open the next stream of the import's present peer, with an attempt higher than all before."""
        self._book.new_stream(imp)
        self._ledger.emit(open_stream(imp, self._settings, self._transports, self._ledger.now))

    def _pull(self, imp: Import, now: float) -> None:
        """Read what is announced and neither here nor on its way."""
        if not self._transfer_ready or not imp.endpoints:
            return
        wanted = imp.wanted()
        step = self._settings.handoff.pull_pages_max
        for start in range(0, len(wanted), step):
            ordinals = tuple(wanted[start : start + step])
            pages = tuple(imp.request.pages[ordinal] for ordinal in ordinals)
            self._ledger.kv.pool.mark_busy(pages)
            ticket = self._book.new_ticket(imp, ordinals, pages)
            imp.request.marks.pull_started = imp.request.marks.pull_started or now
            self._ledger.emit(pull(imp, ticket, ordinals, pages))

    def _mismatched(self, imp: Import, bad: set[int], now: float) -> None:
        """Rule 1: a mismatch is pulled once more; the earlier read is over, or PullEnded would not have come."""
        self._fault(imp, "integrity", now)
        if bad & imp.retried:
            self._give_up_peer(imp, now)
            return
        imp.retried |= bad
        self._pull(imp, now)

    def _land(self, imp: Import, now: float) -> None:
        """Go on here once every page is verified and the first token is known."""
        request = imp.request
        if not imp.is_landed or request.num_outputs <= imp.num_open_outputs:
            return
        accepted = imp.accepted
        assert accepted is not None and request.state is State.RECEIVING
        self._ledger.emit(SendRelease(imp.stream_id, ReleaseReason.DONE))
        self._fences.success(imp.peer.instance_id)
        count_landing(self._ledger, imp, now)
        self._book.remove(imp)
        request.prefill_worker = imp.peer.address
        request.num_computed = request.num_launched = imp.num_tokens
        request.tree_open = accepted.numerics == self._settings.numerics
        self._ledger.kv.publish(request)
        more = len(request.tokens) - imp.num_tokens > 1
        move(request, State.EXTENDING if more else State.DECODING)

    def _fault(self, imp: Import, reason: str, now: float) -> None:
        count_failure(self._ledger, imp, reason)
        self._fences.fault(imp.peer.instance_id, now)

    def _try_again(self, imp: Import, now: float) -> None:
        """The same peer once more (it may still hold the pages), then the next one."""
        if imp.tries_of_peer >= _TRIES_PER_PEER:
            self._give_up_peer(imp, now)
            return
        if imp.streams_opened >= self._settings.handoff.attempts_max:
            self._give_up_peer(imp, now)
            return
        self._close_attempt(imp)
        self._open(imp)

    def _give_up_peer(self, imp: Import, now: float) -> None:
        if imp.is_open:
            self._ledger.emit(SendRelease(imp.stream_id, ReleaseReason.LOCAL))
            self._book.forget_stream(imp)
        self._close_attempt(imp)
        exhausted = imp.streams_opened >= self._settings.handoff.attempts_max
        if exhausted or not self._next_peer(imp, now):
            self._compute_here(imp, now)
        else:
            self._open(imp)

    def _next_peer(self, imp: Import, now: float) -> bool:
        """Turn to the next named peer that is not fenced; whether there is one."""
        for index in range(imp.peer_index + 1, len(imp.request.peers)):
            if not self._fences.is_fenced(imp.request.peers[index].instance_id, now):
                imp.turn_to(index, self._settings.page_tokens)
                return True
        return False

    def _compute_here(self, imp: Import, now: float) -> None:
        request = imp.request
        self._book.remove(imp)
        request.local_fallback = True
        self._ledger.counters.local_prefills += 1
        move(request, State.WAITING)
        self._ledger.wait(request)

    def _close_attempt(self, imp: Import) -> None:
        """End the present stream and drop its pages; those under a read stay quarantined until it is over."""
        self._stop_pulls(imp)
        if imp.is_open:
            self._ledger.emit(DropStream(imp.stream_id))
            self._book.forget_stream(imp)
        request = imp.request
        self._book.unqueue(imp)
        self._ledger.kv.release_request(request)
        self._ledger.stop_running(request)
        request.forget_progress()
        imp.reset()
        if request.state is State.RECEIVING:
            move(request, State.AWAITING)

    def _stop_pulls(self, imp: Import) -> None:
        for number, ticket in self._book.tickets.items():
            if ticket.owner is imp and ticket.is_current:
                self._ledger.emit(CancelPull(number))
        imp.generation += 1


def ended_by(cause: CancelCause) -> EndReason:
    """Map why a request is cancelled to how it ends."""
    return EndReason.STOP if cause is CancelCause.STOP_STRING else EndReason.CANCELLED

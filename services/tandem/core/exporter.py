"""Prefill's side of the hand-off: prompts computed for somebody else, whose pages stay readable until released.

Open is create-or-attach; Release frees; any other end of a stream starts the lease. Pages are freed only after the
transfer process has acknowledged that it serves them no longer. docs/architecture.md section 2 has the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tandem.core.exports import CHECKSUM_BYTES, Export, ExportBook, rank_pages
from tandem.core.ledger import Ledger
from tandem.core.messages.handoff import (
    Accepted,
    Announce,
    Complete,
    EndCode,
    EndStream,
    FirstToken,
    Open,
    OpenReceived,
    RankEndpoint,
    ReleaseReason,
    ReleaseReceived,
    SendAccepted,
    SendAnnounce,
    SendComplete,
    SendFirstToken,
    StreamLost,
)
from tandem.core.messages.requests import EndReason
from tandem.core.messages.transfer import Export as ExportPages
from tandem.core.messages.transfer import Exported, Revoke, Revoked, TransferReady
from tandem.core.request import Marks, Request
from tandem.core.sharding import Piece, pair_fault, pieces
from tandem.core.states import State
from tandem.core.token_ids import BYTES_PER_TOKEN, pack, unpack

_ONE_SIDED_PREFIX = "mooncake"


class Exporter:
    """Implements the planner's Admission for the prefill role."""

    def __init__(self, ledger: Ledger, new_token: Callable[[], bytes]) -> None:
        self._ledger = ledger
        self._settings = ledger.settings
        self._new_token = new_token
        handoff = ledger.settings.handoff
        self._book = ExportBook(remember_seconds=max(60.0, 2 * handoff.lease_seconds))
        self._cap_pages = max(1, int(handoff.importer_share * ledger.settings.num_pages))
        self._endpoints: tuple[RankEndpoint, ...] = ()  # empty: the transfer process is away
        self._num_requests = 0
        self.draining = False

    # ---- Admission ------------------------------------------------------------------------------------------------

    def first_startable(self, waiting: Sequence[Request]) -> Request | None:
        """Rule 7: a capped hand-off is skipped together with later ones of its own importer, and only those."""
        skipped: set[bytes] = set()
        for request in waiting:
            export = self._book.of(request)
            if export.importer in skipped:
                continue
            pinned = self._book.pinned(export.importer)
            if pinned == 0 or pinned + export.total_pages <= self._cap_pages:
                return request
            skipped.add(export.importer)
        return None

    def started(self, request: Request) -> None:
        """Pin the whole prompt's pages from ordinal 0; what the prefix cache had is final already."""
        export = self._book.of(request)
        export.pages = list(request.pages)
        self._ledger.kv.pool.acquire(export.pages)
        self._book.pin(export.importer, export.total_pages)
        export.computed = request.num_computed // self._settings.page_tokens
        self._export(export)

    def computed(self, request: Request, now: float) -> None:
        """Announce what a chunk has finished; forward the first token at once."""
        export = self._book.of(request)
        done = request.num_computed >= export.open_length
        export.computed = export.total_pages if done else request.num_computed // self._settings.page_tokens
        if request.state is State.HANDING_OFF and export.first_token is None:
            export.first_token = FirstToken(
                token_id=request.tokens[-1],
                logprob=request.last_logprob,
                prompt_logprobs=tuple(request.prompt_logprobs),
                cached_tokens=request.cached_tokens,
                queue_seconds=request.marks.queue_seconds,
                prefill_seconds=request.marks.prefill_seconds,
            )
        self._export(export)
        self._send_first_token(export)
        self._maybe_complete(export)

    def make_room(self, seq: int, missing: int) -> bool:
        """Leased hand-offs are the first to go. Pages on their way back are waited for, not added to."""
        coming = sum(export.total_pages for export in self._book.revoking.values())
        leased = [export for export in self._book.leased() if export.request.seq != seq]
        if coming >= missing or not leased:
            return False
        self._ledger.counters.leases_expired += 1
        self._finish(leased[0], EndReason.PEER_LOST)
        return True

    # ---- stream events --------------------------------------------------------------------------------------------

    def opened(self, event: OpenReceived, now: float) -> None:
        """Rule 3: create, attach or refuse."""
        open_ = event.open
        refusal = self._refusal(open_, now)
        if refusal is not None:
            self._ledger.emit(EndStream(event.stream_id, *refusal))
            return
        export = self._book.live.get(open_.handoff_id)
        if export is None:
            self._create(event.stream_id, open_, now)
        else:
            self._attach(export, event.stream_id, open_)

    def released(self, event: ReleaseReceived, now: float) -> None:
        """Status OK: every announced page was pinned until now. The pins go at once."""
        export = self._book.by_stream(event.stream_id)
        if export is None:
            return
        self._ledger.emit(EndStream(event.stream_id, EndCode.OK))
        done = event.reason is ReleaseReason.DONE
        self._finish(export, EndReason.HANDED_OFF if done else EndReason.CANCELLED)

    def stream_lost(self, event: StreamLost, now: float) -> None:
        """Rule 2: any end but a Release starts the lease; computing goes on until it ends."""
        export = self._book.by_stream(event.stream_id)
        if export is not None:
            self._lease(export, now)

    def lease_due(self, handoff_id: bytes, now: float) -> None:
        export = self._book.live.get(handoff_id)
        if export is None or export.lease_until is None or export.lease_until > now:
            return
        self._ledger.counters.leases_expired += 1
        self._finish(export, EndReason.PEER_LOST)

    def end(self, request: Request, reason: EndReason, code: EndCode, message: str) -> None:
        """End a hand-off from this side: its deadline, or the end of a drain."""
        export = self._book.of(request)
        if export.stream_id is not None:
            self._ledger.emit(EndStream(export.stream_id, code, message))
        self._finish(export, reason)

    # ---- transfer events ------------------------------------------------------------------------------------------

    def transfer_ready(self, event: TransferReady, now: float) -> None:
        self._endpoints = event.endpoints
        for export in self._book.live.values():
            self._accept(export)

    def transfer_lost(self, now: float) -> None:
        """Nothing is served any more: revocations are proven, and every stream ends (it named the old process)."""
        self._endpoints = ()
        for export in list(self._book.revoking.values()):
            self._unpin(export)
        self._book.revoking.clear()
        for export in list(self._book.live.values()):
            export.in_transfer = False
            export.forget_announcements()
            if export.stream_id is not None:
                self._ledger.emit(EndStream(export.stream_id, EndCode.LOST, "the transfer process restarted"))
                self._lease(export, now)

    def exported(self, event: Exported, now: float) -> None:
        """The pages are hashed and readable: announce them."""
        export = self._book.live.get(event.handoff_id)
        if export is None or export.stream_id is None or export.open.attempt != event.attempt:
            return
        assert event.first_ordinal == export.announced, "the transfer processes answer in order"
        first, num_pieces = export.announced, len(self._pieces(export.open))
        export.announced += len(event.checksums) // (CHECKSUM_BYTES * num_pieces)
        pages = export.pages[first : export.announced] if self._is_one_sided else []
        ready = min(export.announced * self._settings.page_tokens, export.open_length)
        announce = Announce(first, ready, rank_pages(event.checksums, num_pieces, pack(pages)))
        self._ledger.emit(SendAnnounce(export.stream_id, announce))
        self._maybe_complete(export)

    def revoked(self, event: Revoked, now: float) -> None:
        export = self._book.revoking.pop(event.handoff_id, None)
        if export is not None:
            self._unpin(export)

    # ---- figures --------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self._book.live and not self._book.revoking

    @property
    def num_exporting(self) -> int:
        return sum(bool(export.pages) for export in self._book.live.values())

    @property
    def num_leased(self) -> int:
        return sum(export.is_leased for export in self._book.live.values())

    def pinned_pages(self) -> list[int]:
        """Every pin of a hand-off, for the self-check; a page may occur more than once."""
        owners = [*self._book.live.values(), *self._book.revoking.values()]
        return [page for export in owners for page in export.pages]

    # ---- inside ---------------------------------------------------------------------------------------------------

    @property
    def _is_one_sided(self) -> bool:
        return any(endpoint.transport.startswith(_ONE_SIDED_PREFIX) for endpoint in self._endpoints)

    def _pieces(self, open_: Open) -> tuple[Piece, ...]:
        settings = self._settings
        return pieces(settings.sharding, open_.sharding, settings.num_layers, settings.num_kv_heads)

    def _refusal(self, open_: Open, now: float) -> tuple[EndCode, str] | None:
        settings, length = self._settings, len(open_.prompt_token_ids) // BYTES_PER_TOKEN
        export = self._book.live.get(open_.handoff_id)
        if open_.fingerprint != settings.fingerprint:
            return EndCode.MISMATCH, f"fingerprint {open_.fingerprint!r} is not {settings.fingerprint!r}"
        if fault := pair_fault(settings.sharding, open_.sharding, settings.num_layers, settings.num_kv_heads):
            return EndCode.MISMATCH, fault
        if settings.checksum not in open_.checksums:
            return EndCode.MISMATCH, f"checksum {settings.checksum} is not among {open_.checksums}"
        if self._endpoints and not any(own.transport in open_.transports for own in self._endpoints):
            return EndCode.MISMATCH, f"no transport in common with {open_.transports}"
        if len(open_.prompt_token_ids) % BYTES_PER_TOKEN or not 0 < length <= settings.max_req_input_len:
            return EndCode.INVALID, f"prompt of {length} tokens, {settings.max_req_input_len} is the most"
        if not 0 <= open_.output_tokens < length or open_.sampling.max_tokens == 0:
            return EndCode.INVALID, "the output count does not fit the tokens"
        if open_.tokens_held % settings.page_tokens or not 0 <= open_.tokens_held < length:
            return EndCode.INVALID, f"tokens_held {open_.tokens_held} is not page-aligned and below the prompt"
        if export is None:
            return self._refusal_to_create(open_, now)
        if open_.attempt <= export.open.attempt:
            return EndCode.STALE_ATTEMPT, f"attempt {open_.attempt} is not above {export.open.attempt}"
        same = (export.open.prompt_token_ids, export.open.output_tokens, export.open.adapter_digest)
        if (open_.prompt_token_ids, open_.output_tokens, open_.adapter_digest) != same:
            return EndCode.INVALID, "another attempt of this hand-off carried other tokens"
        return None

    def _refusal_to_create(self, open_: Open, now: float) -> tuple[EndCode, str] | None:
        if not self._ledger.adapters.has(open_.adapter_digest):
            return EndCode.MISMATCH, f"adapter {open_.adapter!r} ({open_.adapter_digest[:12]}) is not loaded here"
        if self._book.has_ended(open_.handoff_id, now):
            return EndCode.STALE_ATTEMPT, "this hand-off has ended"
        if self.draining:
            return EndCode.DRAINING, "draining"
        if len(self._ledger.waiting) >= self._settings.scheduler.max_waiting_requests:
            return EndCode.OVERLOADED, f"{len(self._ledger.waiting)} prompts are waiting"
        return None

    def _create(self, stream_id: int, open_: Open, now: float) -> None:
        self._num_requests += 1
        tokens = unpack(open_.prompt_token_ids)
        request = Request(
            request_id=-self._num_requests,
            seq=self._ledger.next_seq(),
            state=State.WAITING,
            sampling=open_.sampling,
            tokens=tokens,
            num_prompt=len(tokens) - open_.output_tokens,
            num_given=open_.output_tokens,
            salt=open_.cache_salt,
            adapter=open_.adapter_digest,
            adapter_name=open_.adapter,
            deadline=None if open_.timeout_seconds is None else now + open_.timeout_seconds,
            marks=Marks(arrived=now),
            is_export=True,
        )
        export = Export(
            open=open_,
            open_length=len(tokens),
            request=request,
            total_pages=self._settings.pages_for(len(tokens)),
            held_pages=0,
            token=b"",
            stream_id=stream_id,
        )
        export.begin_attempt(open_, self._new_token(), stream_id, self._settings.page_tokens)
        self._book.add(export)
        self._ledger.enter(request)
        self._accept(export)

    def _attach(self, export: Export, stream_id: int, open_: Open) -> None:
        """A higher attempt: the older stream ends, the token is rotated, pins move to the new importer."""
        if export.stream_id is not None:
            self._ledger.emit(EndStream(export.stream_id, EndCode.SUPERSEDED, f"by attempt {open_.attempt}"))
            self._book.unbind(export)
        if export.pages:
            self._book.unpin(export.importer, export.total_pages)
            self._book.pin(open_.importer_instance_id, export.total_pages)
        export.begin_attempt(open_, self._new_token(), stream_id, self._settings.page_tokens)
        self._book.bind(export)
        self._accept(export)

    def _accept(self, export: Export) -> None:
        """Answer the present attempt, once the transfer process is there, and tell it everything that is ready."""
        if not self._endpoints or export.stream_id is None or export.accepted_sent:
            return
        export.accepted_sent = True
        accepted = Accepted(
            handoff_token=export.token,
            endpoints=tuple(own for own in self._endpoints if own.transport in export.open.transports),
            sharding=self._settings.sharding,
            numerics=self._settings.numerics,
            checksum=self._settings.checksum,
            lease_seconds=self._settings.handoff.lease_seconds,
        )
        self._ledger.emit(SendAccepted(export.stream_id, accepted))
        self._export(export)
        self._send_first_token(export)
        self._maybe_complete(export)

    def _export(self, export: Export) -> None:
        if not export.accepted_sent or export.computed <= export.exported:
            return
        first, export.exported = export.exported, export.computed
        export.in_transfer = True
        pages = tuple(export.pages[first : export.exported])
        opened = export.open
        command = ExportPages(opened.handoff_id, opened.attempt, export.token, first, pages, opened.sharding)
        self._ledger.emit(command)

    def _send_first_token(self, export: Export) -> None:
        if export.first_token is None or export.first_token_sent or not export.accepted_sent:
            return
        assert export.stream_id is not None
        export.first_token_sent = True
        self._ledger.emit(SendFirstToken(export.stream_id, export.first_token))

    def _maybe_complete(self, export: Export) -> None:
        if export.stream_id is None or not export.first_token_sent or export.announced < export.total_pages:
            return
        marks = export.request.marks
        complete = Complete(queue_seconds=marks.queue_seconds, prefill_seconds=marks.prefill_seconds)
        self._ledger.emit(SendComplete(export.stream_id, complete))

    def _lease(self, export: Export, now: float) -> None:
        self._book.unbind(export)
        export.lease_until = now + self._settings.handoff.lease_seconds
        export.accepted_sent = False
        self._ledger.counters.leases_started += 1
        self._ledger.timers.at(export.lease_until, ("lease", export.handoff_id))

    def _finish(self, export: Export, reason: EndReason) -> None:
        """End the hand-off and its request; unpin, once the transfer process serves nothing of it."""
        self._book.remove(export, self._ledger.now)
        self._ledger.end(export.request, reason, self._ledger.now)
        if export.in_transfer:
            self._book.revoking[export.handoff_id] = export
            self._ledger.emit(Revoke(export.handoff_id))
        else:
            self._unpin(export)

    def _unpin(self, export: Export) -> None:
        if export.pages:
            self._book.unpin(export.importer, export.total_pages)
            pages, export.pages = export.pages, []
            self._ledger.kv.release(pages)

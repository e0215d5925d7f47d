"""The scheduler of one worker: events in, plans and effects out. No I/O, no clock, no randomness.

    for event in ports.wait():
        scheduler.handle(event, clock())            account: the only place where a request's state changes
    while device.unresolved <= depth and (plan := scheduler.plan(clock())):
        device.launch(plan)                         decide and launch; the result comes back as an event
    ports.flush(scheduler.drain_effects())

The role is data: it picks who implements the planner's Admission (Importer for decode, Exporter for prefill,
LocalOnly for unified). Time is monotonic seconds, given with every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.core.exporter import Exporter
from tandem.core.importer import Importer, ended_by
from tandem.core.kv_cache import KvCache
from tandem.core.ledger import Ledger
from tandem.core.messages import handoff, plans, requests, transfer
from tandem.core.messages.handoff import EndCode
from tandem.core.messages.plans import Plan
from tandem.core.messages.requests import Cancel, Drain, Ended, EndReason, Submit
from tandem.core.messages.worker import AdaptersChanged
from tandem.core.planner import Admission, Planner
from tandem.core.policy import Fences
from tandem.core.request import Marks, Request
from tandem.core.roles import ROLES
from tandem.core.selfcheck import SelfCheck
from tandem.core.settings import SchedulerSettings
from tandem.core.states import State
from tandem.core.stats import LoadSnapshot
from tandem.core.token_ids import BYTES_PER_TOKEN, unpack

TOKEN_BYTES = 16
# Nothing was computed here that another worker would have to compute again; a drain hands these back at once.
_NOT_BEGUN = (State.WAITING, State.AWAITING, State.RECEIVING)


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened but time: look at the timers."""


class LocalOnly:
    """The planner's Admission where nothing is handed over."""

    def first_startable(self, waiting: Sequence[Request]) -> Request | None:
        return waiting[0] if waiting else None

    def started(self, request: Request) -> None:
        """Nothing to do."""

    def make_room(self, seq: int, missing: int) -> bool:
        return False

    def computed(self, request: Request, now: float) -> None:
        """Nothing to do."""


class Scheduler:
    """One brain per worker. `new_token` returns TOKEN_BYTES unguessable bytes: hand-off capabilities."""

    def __init__(self, settings: SchedulerSettings, new_token: Callable[[], bytes]) -> None:
        self.settings = settings
        self.kv = KvCache(settings.num_pages, settings.page_tokens, settings.prefix_cache)
        self._ledger = Ledger(settings, self.kv)
        self._fences = Fences(settings.handoff.fence_faults, settings.handoff.fence_seconds)
        traits = ROLES[settings.role]
        self._importer = Importer(self._ledger, self._fences) if traits.takes_peers else None
        self._exporter = Exporter(self._ledger, new_token) if traits.exports else None
        admission: Admission = self._importer or self._exporter or LocalOnly()
        self._planner = Planner(self._ledger, admission, self._finish)
        self._check = SelfCheck(self._ledger)
        self._draining = False
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            Submit: self._submit,
            Cancel: self._cancel,
            Drain: self._drain,
            Tick: _ignore,
            AdaptersChanged: self._adapters_changed,
            transfer.TransferReady: _ignore,
            transfer.TransferLost: _ignore,
            plans.PlanResolved: self._planner.resolved,
            transfer.TransportFallback: self._fallback,
            **self._importer_handlers(),
            **self._exporter_handlers(),
        }

    def _importer_handlers(self) -> dict[type, Callable[[Any, float], None]]:
        importer = self._importer
        if importer is None:
            return {}
        return {
            handoff.StreamAccepted: importer.accepted,
            handoff.StreamAnnounced: importer.announced,
            handoff.StreamFirstToken: importer.first_token,
            handoff.StreamCompleted: importer.completed,
            handoff.StreamClosed: importer.closed,
            transfer.TransferReady: importer.transfer_ready,
            transfer.TransferLost: lambda event, now: importer.transfer_lost(),
            transfer.PullEnded: importer.pull_ended,
        }

    def _exporter_handlers(self) -> dict[type, Callable[[Any, float], None]]:
        exporter = self._exporter
        if exporter is None:
            return {}
        return {
            handoff.OpenReceived: exporter.opened,
            handoff.ReleaseReceived: exporter.released,
            handoff.StreamLost: exporter.stream_lost,
            transfer.TransferReady: exporter.transfer_ready,
            transfer.TransferLost: lambda event, now: exporter.transfer_lost(now),
            transfer.Exported: exporter.exported,
            transfer.Revoked: exporter.revoked,
        }

    # ---- the loop's calls -----------------------------------------------------------------------------------------

    def handle(self, event: object, now: float) -> None:
        """Account one event. Raises KeyError for an event that this role does not take."""
        self._ledger.now = now
        self._handlers[type(event)](event, now)
        for name in self._ledger.timers.due(now):
            self._due(name, now)
        if self._importer is not None:
            self._importer.advance(now)

    def plan(self, now: float) -> Plan | None:
        """Decide the next forward pass; None only if nothing was changed."""
        self._ledger.now = now
        return self._planner.plan(now)

    def drain_effects(self) -> list[object]:
        """Take what is to be said, in order: to the frontend and to the transfer process."""
        effects, self._ledger.effects = self._ledger.effects, []
        return effects

    def next_timer(self) -> float | None:
        return self._ledger.timers.next()

    def finished(self) -> bool:
        """Whether it was told to drain and nothing is left."""
        return self._draining and self.idle

    @property
    def idle(self) -> bool:
        """Whether nobody wants anything and nothing is under way."""
        handed_over = (self._importer is None or self._importer.idle) and (
            self._exporter is None or self._exporter.idle
        )
        return not self._ledger.requests and self._planner.num_in_flight == 0 and handed_over

    def self_check(self) -> list[str]:
        """Compare every page's references with who is known to hold it; orphans go to quarantine. For idle moments."""
        pins = self._exporter.pinned_pages() if self._exporter is not None else []
        under_read = self._importer.pages_under_read() if self._importer is not None else []
        faults = self._check.run(pins, under_read)
        self._ledger.counters.self_check_faults += len(faults)
        return faults

    def load(self, now: float) -> LoadSnapshot:
        ledger, importer, exporter = self._ledger, self._importer, self._exporter
        counters = {name: getattr(ledger.counters, name) for name in ledger.counters.__slots__}
        return LoadSnapshot(
            running_requests=len(ledger.requests) - ledger.num_waiting,
            waiting_requests=ledger.num_waiting,
            waiting_uncached_tokens=sum(len(request.tokens) for request in ledger.waiting),
            pages=self.kv.pool.counts(),
            transfers_inflight=importer.num_pulling if importer else exporter.num_exporting if exporter else 0,
            transfers_waiting=importer.num_queued if importer else 0,
            leased_handoffs=exporter.num_leased if exporter else 0,
            fenced_instance_ids=self._fences.fenced(now),
            draining=self._draining,
            orphaned_pages=self.kv.pool.num_orphans,
            **counters,
            **ledger.tallies.figures(now),
        )

    # ---- requests -------------------------------------------------------------------------------------------------

    def _submit(self, event: Submit, now: float) -> None:
        ledger = self._ledger
        prompt, outputs = unpack(event.prompt_token_ids), unpack(event.output_token_ids)
        refusal = self._refusal(event, len(prompt))
        if refusal is not None:
            ledger.tallies.ended[refusal.reason.value] += 1
            ledger.emit(refusal)
            return
        importing = self._importer is not None and bool(event.peers) and event.sampling.max_tokens > 0
        request = Request(
            request_id=event.request_id,
            seq=ledger.next_seq(),
            state=State.AWAITING if importing else State.WAITING,
            sampling=event.sampling,
            tokens=prompt + outputs,
            num_prompt=len(prompt),
            num_given=len(outputs),
            salt=event.cache_salt,
            adapter=ledger.adapters.digest_of(event.adapter),
            adapter_name=event.adapter,
            deadline=None if event.timeout_seconds is None else now + event.timeout_seconds,
            marks=Marks(arrived=now),
            peers=event.peers,
        )
        ending = ledger.stop_reason(request) if outputs else None
        ledger.enter(request)
        if ending is not None:
            ledger.end(request, ending[0], now, stop_token_id=ending[1])
        elif importing and self._importer is not None:
            self._importer.submit(request, now)

    def _refusal(self, event: Submit, length: int) -> Ended | None:
        settings = self.settings
        total = length + event.sampling.max_tokens
        if self._draining:
            return Ended(request_id=event.request_id, reason=EndReason.DRAINED, message="this worker is draining")
        if self._exporter is not None:
            return _rejected(event, "", "a prefill worker takes hand-offs, not requests")
        fault = self._ledger.adapters.fault(event.adapter, event.adapter_digest)
        if fault:
            return _rejected(event, "lora_adapter", fault)
        if not 0 < length <= settings.max_req_input_len:
            return _rejected(
                event, "prompt", f"prompt of {length} tokens; 1 to {settings.max_req_input_len} are served"
            )
        num_outputs = len(event.output_token_ids) // BYTES_PER_TOKEN
        if length + num_outputs > settings.max_context_tokens:
            return _rejected(event, "prompt", f"prompt and output exceed the context of {settings.max_context_tokens}")
        if min(total, settings.max_context_tokens) - 1 > settings.max_total_num_tokens:
            most = settings.max_total_num_tokens
            return _rejected(
                event, "max_tokens", f"prompt + max_tokens = {total} never fits the KV pool of {most} tokens"
            )
        if not all(0 <= peer.output_tokens <= num_outputs for peer in event.peers):
            return _rejected(event, "peers", f"a hand-off with more than the request's {num_outputs} output tokens")
        if self._ledger.num_waiting >= settings.scheduler.max_waiting_requests:
            return _rejected(event, "", f"{self._ledger.num_waiting} requests are waiting already", overloaded=True)
        return None

    def _cancel(self, event: Cancel, now: float) -> None:
        request = self._ledger.requests.get(event.request_id)
        if request is None:
            return
        if self._importer is not None:
            self._importer.cancel(request, event.cause)
        self._ledger.end(request, ended_by(event.cause), now)

    def _finish(self, request: Request, now: float) -> bool:
        """End a request whose known output (or, for scoring, computed prompt) ends it; whether it did."""
        ending = self._ledger.stop_reason(request)
        if ending is None and request.sampling.max_tokens == 0:
            ending = (EndReason.LENGTH, None)
        if ending is None:
            return False
        self._ledger.end(request, ending[0], now, stop_token_id=ending[1])
        return True

    def _drain(self, event: Drain, now: float) -> None:
        self._draining = True
        if self._exporter is not None:
            self._exporter.draining = True
        if event.grace_seconds is None:
            return
        self._ledger.timers.at(now + event.grace_seconds, ("drained",))
        if self._exporter is None:
            for request in list(self._ledger.requests.values()):
                if request.state in _NOT_BEGUN:
                    self._end_early(request, EndReason.DRAINED, EndCode.DRAINING, "the worker is stopping")

    def _adapters_changed(self, event: AdaptersChanged, now: float) -> None:
        self._ledger.adapters.change(event.adapters)

    def adapters_in_use(self) -> frozenset[str]:
        """Digests that a name stands for, or that a live request is computed with: the device must keep these."""
        return self._ledger.adapters.digests | {request.adapter for request in self._ledger.requests.values()} - {""}

    def _fallback(self, event: transfer.TransportFallback, now: float) -> None:
        self._ledger.counters.transfer_fallbacks += 1

    # ---- timers ---------------------------------------------------------------------------------------------------

    def _due(self, name: Any, now: float) -> None:
        kind = name[0]
        if kind == "deadline":
            request = self._ledger.requests.get(name[1])
            if request is not None:
                self._end_early(request, EndReason.DEADLINE, EndCode.DEADLINE, "the deadline passed")
        elif kind == "lease" and self._exporter is not None:
            self._exporter.lease_due(name[1], now)
        elif kind == "drained":
            for request in list(self._ledger.requests.values()):
                self._end_early(request, EndReason.DRAINED, EndCode.DRAINING, "the worker stopped")

    def _end_early(self, request: Request, reason: EndReason, code: EndCode, message: str) -> None:
        """A drain leaves decode's streams to their lease, so that another decode worker can attach."""
        if self._exporter is not None:
            self._exporter.end(request, reason, code, message)
            return
        if self._importer is not None:
            drained = reason is EndReason.DRAINED
            cause = requests.CancelCause.SESSION_LOST if drained else requests.CancelCause.CLIENT
            self._importer.cancel(request, cause)
        self._ledger.end(request, reason, self._ledger.now, message=message)


def _ignore(event: object, now: float) -> None:
    """Time has passed, or a transfer process changed where nothing is handed over."""


def _rejected(event: Submit, field_name: str, message: str, *, overloaded: bool = False) -> Ended:
    return Ended(
        request_id=event.request_id,
        reason=EndReason.REJECTED,
        message=message,
        field_name=field_name,
        overloaded=overloaded,
    )

"""Decides what the device computes next, and accounts what it computed.

There is no prefill phase and no decode phase: each request has tokens known and tokens computed, and rows close the
gap. Decode rows come first, then the rest of prompts in progress, then prompts that get their pages now. With several
stages each plan takes its share of them only (`core/microbatches.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from tandem.core.ledger import Ledger
from tandem.core.messages.plans import Plan, PlanResolved, Row, RowResult, Sample
from tandem.core.messages.sampling import TokenLogprob
from tandem.core.microbatches import PROMPT_ROUNDS, UNDIVIDED, Microbatches, Share, row_cost, tokens_within
from tandem.core.policy import PlanBudget
from tandem.core.request import Request
from tandem.core.roles import ROLES
from tandem.core.states import State, move


class Admission(Protocol):
    """What the role's hand-off side has to say about pages and prompts."""

    def first_startable(self, waiting: Sequence[Request]) -> Request | None:
        """Return the first waiting request that may take pages now; those before it are skipped, not waited for."""

    def started(self, request: Request) -> None:
        """The request has all pages of its prompt now."""

    def make_room(self, seq: int, missing: int) -> bool:
        """Give up revocable pages for the request with arrival `seq`; whether any were given up.

        `missing` pages lack even after all that come back by themselves.
        """

    def computed(self, request: Request, now: float) -> None:
        """More of the request's known tokens are in its pages."""


class Planner:
    """Builds plans from the ledger's queues. Retracts decoding requests when the pool is short."""

    def __init__(self, ledger: Ledger, admission: Admission, finish: Callable[[Request, float], bool]) -> None:
        self._ledger = ledger
        self._admission = admission
        self._finish = finish  # ends a request whose known output ends it; whether it did
        settings = ledger.settings
        self._settings = settings
        self._traits = ROLES[settings.role]
        self._budget = PlanBudget(settings.scheduler.budget_tokens, settings.scheduler.step_seconds_max)
        self._microbatches = Microbatches(settings.stages, settings.scheduler.microbatch_tokens_min)
        self._in_flight: deque[tuple[Plan, tuple[Request, ...]]] = deque()
        self._retracted = False

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    # ---- decide ---------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan | None:
        """Decide the next forward pass. None only if nothing was changed."""
        while True:
            self._retracted = False
            rows: list[Row] = []
            owners: list[Request] = []
            for row, owner in self._rows(now):
                if owner.state is State.FINISHED:
                    continue  # a leased hand-off that has just made room: its pages may be somebody else's already
                rows.append(row)
                owners.append(owner)
            if rows:
                return self._launch(tuple(rows), tuple(owners))
            if not self._retracted:
                return None

    def _launch(self, rows: tuple[Row, ...], owners: tuple[Request, ...]) -> Plan:
        pool = self._ledger.kv.pool
        plan = Plan(pool.launched + 1, rows)
        pool.note_launch(plan.plan_id)
        self._ledger.tallies.device.launched(self._ledger.now)
        self._in_flight.append((plan, owners))
        if self._microbatches.divides:
            self._microbatches.launched(rows, sum(owner.state is State.DECODING for owner in owners))
        for row, request in zip(rows, owners, strict=True):
            request.num_launched = row.start + row.num_tokens
            request.last_plan = plan.plan_id
            request.rows_in_flight += 1
            request.samples_in_flight += row.sample is not None
        return plan

    def _rows(self, now: float) -> list[tuple[Row, Request]]:
        rows: list[tuple[Row, Request]] = []
        decoding = self._decoding()
        share, taken = self._share(decoding), 0.0
        for request in decoding:
            if request.state is State.DECODING and not request.retracting:
                cost = row_cost(request.num_launched, 1)
                if not share.takes(taken, cost):
                    continue
                row = self._decode_row(request, now)
                if row is not None:
                    taken += cost
                    rows.append((row, request))
        left, room = max(1, self._budget.tokens() - len(rows)), share.prompt_room(taken)
        for request in self._ledger.running:
            if left <= 0 or room <= 0.0:
                return rows
            if request.state is State.EXTENDING and len(request.tokens) > request.num_launched:
                row = self._extend_row(request, left, room)
                left, room = left - row.num_tokens, room - row_cost(row.start, row.num_tokens)
                rows.append((row, request))
        while left > 0 and room > 0.0 and (started := self._admit(now)) is not None:
            row = self._extend_row(started, left, room)
            left, room = left - row.num_tokens, room - row_cost(row.start, row.num_tokens)
            rows.append((row, started))
        return rows

    def _decoding(self) -> list[Request]:
        """Return the decoding requests in the order of their rows, known tokens first.

        A speculative row must not take the page that somebody's known token needs. Where a plan takes a share only, who
        was in a plan last waits for those that were left out.
        """
        decoding = [request for request in self._ledger.running if request.state is State.DECODING]
        if self._microbatches.divides:
            return sorted(decoding, key=lambda request: request.last_plan)  # no row is speculative there
        return sorted(decoding, key=lambda request: len(request.tokens) <= request.num_launched)

    def _share(self, decoding: Sequence[Request]) -> Share:
        if not self._microbatches.divides:
            return UNDIVIDED
        ledger, most = self._ledger, self._settings.stages * PROMPT_ROUNDS * self._budget.tokens()
        ready = [
            row_cost(request.num_launched, 1)
            for request in decoding
            if len(request.tokens) > request.num_launched and not request.retracting
        ]
        prompts = 0.0
        for request in (*ledger.running, *(ledger.waiting if ledger.has_slot else ())):
            if prompts >= most:
                break
            if request.state is not State.DECODING:
                prompts += row_cost(request.num_launched, len(request.tokens) - request.num_launched)
        return self._microbatches.share(ready, min(prompts, most))

    def _extend_row(self, request: Request, left: int, room: float) -> Row:
        start = request.num_launched
        count = int(min(left, len(request.tokens) - start, tokens_within(room, start)))
        end = start + count
        is_last = end == len(request.tokens)
        logprobs = request.sampling.prompt_logprobs if request.wants_prompt_logprobs else None
        return Row(
            request_id=request.request_id,
            slot=request.slot,
            start=start,
            num_tokens=count,
            token_ids=tuple(request.tokens[start:end]),
            pages=request.page_table,
            sample=self._sample(request) if is_last and request.sampling.max_tokens > 0 else None,
            prompt_logprobs=logprobs,
            next_token_id=request.tokens[end] if logprobs is not None and not is_last else None,
            zero_tail=is_last and request.is_export and end % self._settings.page_tokens != 0,
            adapter=request.adapter,
        )

    def _decode_row(self, request: Request, now: float) -> Row | None:
        known = len(request.tokens) > request.num_launched
        if not known and not self._may_speculate(request):
            return None
        start = request.num_launched
        if start // self._settings.page_tokens >= len(request.pages) and not self._grow(request, known, now):
            return None
        return Row(
            request_id=request.request_id,
            slot=request.slot,
            start=start,
            num_tokens=1,
            token_ids=(request.tokens[start],) if known else (),
            pages=request.page_table,
            sample=self._sample(request),
            adapter=request.adapter,
        )

    def _may_speculate(self, request: Request) -> bool:
        """Whether another row may be launched before the last one's token is known.

        Not where the end is known by length, and not where the draw needs the tokens before it.
        """
        pending = request.samples_in_flight
        if pending >= self._settings.chain or request.sampling.needs_history:
            return False
        if request.num_outputs + pending >= request.sampling.max_tokens:
            return False
        return len(request.tokens) + pending < self._settings.max_context_tokens

    def _sample(self, request: Request) -> Sample:
        sampling = request.sampling
        index = request.num_outputs + request.samples_in_flight
        banned: tuple[int, ...] = ()
        if index < sampling.min_tokens:
            banned = sampling.stop_token_ids
            if not sampling.ignore_eos:
                banned += self._settings.eos_token_ids
        history = tuple(request.tokens) if sampling.needs_history else ()
        return Sample(
            params=sampling, output_index=index, banned=banned, history=history, num_prompt=request.num_prompt
        )

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _grow(self, request: Request, known: bool, now: float) -> bool:
        """Give a decoding request its next page. A speculative row (not `known`) never costs anybody anything."""
        kv = self._ledger.kv
        pages = kv.allocate(1)
        while pages is None and known:
            if not kv.shortage(1) or any(other.retracting for other in self._ledger.running):
                return False  # pages are coming back: a launch that resolves is an event
            if not self._admission.make_room(request.seq, 1):
                victim = max(
                    (other for other in self._ledger.running if other.state is State.DECODING),
                    key=lambda other: other.seq,
                )
                victim.retracting = True
                if victim.rows_in_flight == 0:
                    self._retract(victim)
                if victim is request:
                    return False
            pages = kv.allocate(1)
        if pages is None:
            return False
        request.set_pages(request.pages + pages)
        return True

    def _retract(self, request: Request) -> None:
        """Take the pages of a decoding request back; it resumes by recomputation over its cached prefix."""
        self._ledger.kv.release_request(request)
        self._ledger.stop_running(request)
        request.forget_progress()
        request.was_retracted = True
        move(request, State.WAITING)
        self._ledger.wait(request)
        self._ledger.counters.retractions += 1
        self._retracted = True

    def _admit(self, now: float) -> Request | None:
        """Start the first waiting request that may start, if all pages of its tokens are there."""
        if not self._ledger.has_slot:
            return None
        request = self._admission.first_startable(self._ledger.waiting)
        return request if request is not None and self._start(request, now) else None

    def _start(self, request: Request, now: float) -> bool:
        kv, ledger = self._ledger.kv, self._ledger
        held = kv.attach_prefix(request, len(request.tokens) - 1)
        need = self._settings.pages_for(len(request.tokens)) - len(request.pages)
        # One page for each decoding request stays free, or the newcomer would be paid for with a retraction.
        spare = sum(other.state is State.DECODING for other in ledger.running)
        fresh = kv.allocate(need, spare)
        while fresh is None and (lacking := kv.shortage(need, spare)):
            if not self._admission.make_room(request.seq, lacking):
                break
            fresh = kv.allocate(need, spare)
        if fresh is None:
            kv.detach_prefix(request)
            return False
        request.set_pages(request.pages + fresh)
        request.num_launched = request.num_computed = held
        if not request.was_retracted:
            request.cached_tokens = held
            ledger.counters.prefix_hit_tokens += held
            ledger.counters.prefix_query_tokens += len(request.tokens)
        marks = request.marks
        if marks.started == 0.0:
            marks.started = now
            marks.queue_seconds = now - marks.arrived
            ledger.tallies.queue.observe(marks.queue_seconds)
        if not request.was_retracted:
            marks.computing = now
        ledger.waiting.remove(request)
        move(request, State.EXTENDING)
        ledger.run(request)
        self._admission.started(request)
        return True

    # ---- account --------------------------------------------------------------------------------------------------

    def resolved(self, event: PlanResolved, now: float) -> None:
        """Account an executed plan: the only place where computed tokens and new output come from."""
        plan, owners = self._in_flight.popleft()
        assert plan.plan_id == event.plan_id, f"plan {event.plan_id} resolved, {plan.plan_id} expected"
        ledger = self._ledger
        ledger.kv.pool.note_resolved(plan.plan_id)
        if self._microbatches.divides:
            self._microbatches.resolved()
        ledger.counters.steps += 1
        ledger.counters.device_seconds += event.device_seconds
        num_tokens, num_rows = plan.num_tokens, len(plan.rows)
        ledger.tallies.device.resolved(now)
        ledger.tallies.batch_requests.observe(num_rows)
        ledger.tallies.batch_tokens.observe(num_tokens)
        self._budget.measured(num_tokens, num_rows, event.device_seconds)
        for row, request, result in zip(plan.rows, owners, event.rows, strict=True):
            request.rows_in_flight -= 1
            request.samples_in_flight -= row.sample is not None
            if request.state is State.FINISHED:
                ledger.counters.discarded_rows += 1
                continue
            ledger.counters.computed_tokens += row.num_tokens
            self._account(request, row, result, now)

    def _account(self, request: Request, row: Row, result: RowResult, now: float) -> None:
        ledger = self._ledger
        request.num_computed = row.start + row.num_tokens
        ledger.kv.publish(request)
        if row.prompt_logprobs is not None:
            _collect_prompt_logprobs(request, row, result)
        if row.sample is not None:
            assert result.token_id is not None
            ledger.append_output(request, result.token_id, result.logprob, now)
        if request.state is State.EXTENDING and (row.sample is not None or request.num_computed == len(request.tokens)):
            self._note_prefill(request, now)
            if not request.is_export and self._finish(request, now):
                return
            move(request, self._traits.after_prompt)
            if self._traits.after_prompt is State.HANDING_OFF:
                ledger.stop_running(request)  # pages bound what is handed over; slots are for what is computed
        elif request.state is State.DECODING and self._finish(request, now):
            return
        self._admission.computed(request, now)
        if request.retracting and request.rows_in_flight == 0:
            self._retract(request)

    def _note_prefill(self, request: Request, now: float) -> None:
        """The prompt is computed. What is extended after a hand-off or a retraction is no prefill."""
        marks = request.marks
        if marks.computing:
            marks.prefill_seconds, marks.computing = now - marks.computing, 0.0
            self._ledger.tallies.prefill.observe(marks.prefill_seconds)


def _collect_prompt_logprobs(request: Request, row: Row, result: RowResult) -> None:
    if row.start == 0:
        request.prompt_logprobs = [TokenLogprob(request.tokens[0], None)]
    room = request.num_prompt - len(request.prompt_logprobs)
    request.prompt_logprobs.extend(result.prompt_logprobs[:room])

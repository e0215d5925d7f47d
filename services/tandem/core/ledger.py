"""The live requests and everything that is said about them: the part of the scheduler's state that its parts share.

It accounts (tokens, ends, slots, effects, timers) and decides nothing about order or pages.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Hashable
from dataclasses import dataclass

from tandem.core.adapters import Adapters
from tandem.core.kv_cache import KvCache
from tandem.core.messages.requests import Ended, EndReason, Timing, Tokens
from tandem.core.messages.sampling import TokenLogprob
from tandem.core.request import Marks, Request
from tandem.core.settings import SchedulerSettings
from tandem.core.states import State, move
from tandem.core.tallies import Tallies


@dataclass(slots=True)
class Counters:
    """Running totals; the same names as in LoadSnapshot."""

    steps: int = 0
    device_seconds: float = 0.0
    computed_tokens: int = 0
    generated_tokens: int = 0
    discarded_rows: int = 0
    retractions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    transferred_bytes: int = 0
    transfer_seconds: float = 0.0
    checksum_mismatches: int = 0
    failed_pulls: int = 0
    first_token_differences: int = 0
    transfer_fallbacks: int = 0
    local_prefills: int = 0
    leases_started: int = 0
    leases_expired: int = 0
    self_check_faults: int = 0


class Timers:
    """Instants at which something named must be looked at. Stale entries are the looker's business."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Hashable]] = []
        self._count = 0

    def at(self, when: float, name: Hashable) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, name))

    def next(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[Hashable]:
        names: list[Hashable] = []
        while self._heap and self._heap[0][0] <= now:
            names.append(heapq.heappop(self._heap)[2])
        return names


def _wait_order(request: Request) -> tuple[bool, int]:
    return (not request.was_retracted, request.seq)


class Ledger:
    """Requests by id, in their queues; slots; effects; counters; timers."""

    def __init__(self, settings: SchedulerSettings, kv: KvCache) -> None:
        self.settings = settings
        self.kv = kv
        self.requests: dict[int, Request] = {}
        self.waiting: list[Request] = []  # retracted first, then by arrival
        self.running: list[Request] = []  # with a slot; by arrival
        self.effects: list[object] = []
        self.now = 0.0  # monotonic seconds of the event or plan in hand
        self.counters = Counters()
        self.tallies = Tallies()
        self.timers = Timers()
        self.adapters = Adapters(settings.adapters)
        self._slots = list(range(settings.scheduler.max_running_requests - 1, -1, -1))
        self._seq = 0

    def emit(self, effect: object) -> None:
        self.effects.append(effect)

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    # ---- queues ---------------------------------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """Take in a new request in its entry state, and watch its deadline."""
        assert request.request_id not in self.requests, request.request_id
        self.requests[request.request_id] = request
        if request.state is State.WAITING:
            self.wait(request)
        if request.deadline is not None:
            self.timers.at(request.deadline, ("deadline", request.request_id))

    def wait(self, request: Request) -> None:
        insort(self.waiting, request, key=_wait_order)

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be computed or received here."""
        return sum(request.state in (State.WAITING, State.AWAITING) for request in self.requests.values())

    @property
    def has_slot(self) -> bool:
        return bool(self._slots)

    def run(self, request: Request) -> None:
        """Give a request a slot and a place among the running."""
        request.slot = self._slots.pop()
        insort(self.running, request, key=lambda other: other.seq)

    def stop_running(self, request: Request) -> None:
        if request.slot >= 0:
            self._slots.append(request.slot)
            request.slot = -1
            self.running.remove(request)

    # ---- output ---------------------------------------------------------------------------------------------------

    def append_output(self, request: Request, token_id: int, logprob: TokenLogprob | None, now: float) -> None:
        """Account one output token, and tell the client unless the request is an export."""
        index = request.num_outputs
        request.tokens.append(token_id)
        marks = request.marks
        if marks.first_token == 0.0:
            marks.first_token = now
        elif marks.second_token == 0.0:
            marks.second_token = now
            self.tallies.first_decode.observe(_first_decode_seconds(marks))
        self.counters.generated_tokens += 1
        if request.is_export:
            request.last_logprob = logprob
            return
        self.emit(
            Tokens(
                request.request_id,
                index,
                (token_id,),
                () if logprob is None else (logprob,),
                self._unsent_prompt_logprobs(request),
            )
        )

    def stop_reason(self, request: Request) -> tuple[EndReason, int | None] | None:
        """Say whether the known output ends the request, and with which stop token."""
        sampling = request.sampling
        count = request.num_outputs
        if count > sampling.min_tokens:
            last = request.tokens[-1]
            if last in sampling.stop_token_ids:
                return EndReason.STOP, last
            if not sampling.ignore_eos and last in self.settings.eos_token_ids:
                return EndReason.STOP, last
        if sampling.max_tokens and count >= sampling.max_tokens:
            return EndReason.LENGTH, None
        if len(request.tokens) >= self.settings.max_context_tokens:
            return EndReason.LENGTH, None
        return None

    def end(
        self, request: Request, reason: EndReason, now: float, *, stop_token_id: int | None = None, message: str = ""
    ) -> None:
        """Finish a request: its pages and slot go, its last word is said. Hand-offs are their owners' business."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        move(request, State.FINISHED)
        self.stop_running(request)
        self.kv.release_request(request)
        del self.requests[request.request_id]
        self.tallies.ended[reason.value] += 1
        if request.is_export:
            return
        self.emit(
            Ended(
                request_id=request.request_id,
                reason=reason,
                stop_token_id=stop_token_id,
                prompt_tokens=request.num_prompt,
                completion_tokens=request.num_outputs,
                cached_tokens=request.cached_tokens,
                prompt_logprobs=self._unsent_prompt_logprobs(request),
                timing=_timing(request, now),
                message=message,
            )
        )

    def _unsent_prompt_logprobs(self, request: Request) -> tuple[TokenLogprob, ...]:
        if request.prompt_logprobs_sent or len(request.prompt_logprobs) < request.num_prompt:
            return ()
        request.prompt_logprobs_sent = True
        return tuple(request.prompt_logprobs)


def _timing(request: Request, now: float) -> Timing:
    """Return the phases; what had not begun when the request ended is zero, and all of its time was waiting."""
    marks = request.marks
    begun = marks.started or marks.first_token
    first = marks.first_token or now
    return Timing(
        queue_seconds=marks.queue_seconds if begun else now - marks.arrived,
        prefill_seconds=marks.prefill_seconds,
        transfer_seconds=max(0.0, marks.pull_ended - marks.pull_started),
        first_decode_seconds=_first_decode_seconds(marks) if marks.second_token else 0.0,
        decode_seconds=now - first,
        transfer_bytes=request.received_bytes,
        transport=request.transport,
        prefill_worker=request.prefill_worker,
    )


def _first_decode_seconds(marks: Marks) -> float:
    """From when decoding could begin to the second token."""
    return max(0.0, marks.second_token - max(marks.first_token, marks.landed))

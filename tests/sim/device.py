"""The hash device: executes plans over a pool of integers. Fast (at launch) or slow (just before it resolves)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

from tandem.core.messages.plans import Plan, PlanResolved, Row, RowResult
from tandem.core.messages.sampling import TokenLogprob
from tandem.core.scheduler import Scheduler
from tests.sim import oracle


class HashDevice:
    """Obeys the Device contract under a virtual clock: plans run in order, one at a time."""

    def __init__(
        self,
        random: Random,
        scheduler: Scheduler,
        pool: list[list[int]],
        later: Callable[[float, Callable[[], None]], None],
        deliver: Callable[[PlanResolved], None],
        seconds_per_token: float,
    ) -> None:
        self._random = random
        self._scheduler = scheduler
        self._pool = pool
        self._later = later
        self._deliver = deliver
        self._seconds = seconds_per_token
        self._last: dict[int, int] = {}  # by slot: the device-resident last token
        self._queue: deque[Plan] = deque()
        self._busy = False
        self.unresolved = 0
        self.in_flight: dict[int, set[int]] = {}  # by plan: the pages that it may touch until it has resolved
        self.alive = True

    def launch(self, plan: Plan) -> None:
        self.unresolved += 1
        self.in_flight[plan.plan_id] = {page for row in plan.rows for page in row.pages}
        self._queue.append(plan)
        if not self._busy:
            self._start()

    def _start(self) -> None:
        plan = self._queue.popleft()
        self._busy = True
        fast = self._random.random() < 0.5
        rows = [self._execute(row) for row in plan.rows] if fast else []
        seconds = self._seconds * (1 + plan.num_tokens) * self._random.uniform(0.5, 1.5)

        def finish() -> None:
            if not self.alive:
                return
            results = rows if fast else [self._execute(row) for row in plan.rows]
            self._busy = False
            if self._queue:
                self._start()
            self.unresolved -= 1
            del self.in_flight[plan.plan_id]
            self._deliver(PlanResolved(plan.plan_id, tuple(results), seconds))

        self._later(seconds, finish)

    def _execute(self, row: Row) -> RowResult:
        size = len(self._pool[0])
        kv = self._scheduler.kv.pool
        tokens = row.token_ids or (self._last[row.slot],)
        assert len(tokens) == row.num_tokens
        total = 0
        for position in range(row.start):
            total = oracle.add(total, self._pool[row.pages[position // size]][position % size])
        for position, token in enumerate(tokens, row.start):
            page = row.pages[position // size]
            assert page not in kv.free_pages(), f"request {row.request_id} writes to the free page {page}"
            assert not kv.is_busy(page), f"request {row.request_id} writes to page {page} under a transfer"
            value = oracle.slot_value(token, position, total)
            self._pool[page][position % size] = value
            total = oracle.add(total, value)
        end = row.start + row.num_tokens
        if row.zero_tail:
            for offset in range(end % size, size):
                self._pool[row.pages[end // size]][offset] = 0
        return self._result(row, total, tokens)

    def _result(self, row: Row, total: int, tokens: tuple[int, ...]) -> RowResult:
        logprobs: tuple[TokenLogprob, ...] = ()
        if row.prompt_logprobs is not None:
            following = [*tokens[1:], *([] if row.next_token_id is None else [row.next_token_id])]
            logprobs = tuple(TokenLogprob(token, -1.0) for token in following)
        if row.sample is None:
            return RowResult(prompt_logprobs=logprobs)
        sample = row.sample
        token = oracle.draw(total, sample.params.seed, sample.output_index, sample.banned, sample.history)
        self._last[row.slot] = token
        return RowResult(token, TokenLogprob(token, -0.5), logprobs)

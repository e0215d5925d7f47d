"""The hash device: executes plans over a pool of integers, in a pipeline of stages, under a virtual clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

from tandem.core.messages.plans import Plan, PlanResolved, Row, RowResult
from tandem.core.messages.sampling import TokenLogprob
from tandem.core.scheduler import Scheduler
from tests.sim import oracle


class HashDevice:
    """Obeys the Device contract: a stage computes one plan at a time, in the order of launches, and passes it on.

    What a plan reads and writes, it reads and writes at one instant. With one stage that is drawn for each plan: when
    it starts, or just before it resolves. With more it is the same border of stages for all plans of this device, so
    that a plan sees what the one before it wrote, though both are in flight.
    """

    def __init__(
        self,
        random: Random,
        scheduler: Scheduler,
        pool: list[list[int]],
        later: Callable[[float, Callable[[], None]], None],
        deliver: Callable[[PlanResolved], None],
        seconds_per_token: float,
        stages: int = 1,
        jitter: float = 0.5,
    ) -> None:
        self._random = random
        self._scheduler = scheduler
        self._pool = pool
        self._later = later
        self._deliver = deliver
        self._seconds = seconds_per_token / stages
        self._jitter = jitter
        self._last: dict[int, int] = {}  # by slot: the device-resident last token
        self._free_at = [0.0] * stages  # when each stage has computed what was launched
        self.busy_seconds = [0.0] * stages
        self._border = random.randint(0, stages) if stages > 1 else None
        self._computing: deque[tuple[Plan, list[RowResult]]] = deque()  # launched, and not yet read and written
        self.now = 0.0  # kept by whoever owns the clock
        self.unresolved = 0
        self.in_flight: dict[int, set[int]] = {}  # by plan: the pages that it may touch until it has resolved
        self.alive = True

    def launch(self, plan: Plan) -> None:
        self.unresolved += 1
        self.in_flight[plan.plan_id] = {page for row in plan.rows for page in row.pages}
        cost = self._seconds * (1 + plan.num_tokens)
        borders = [max(self.now, self._free_at[0])]
        for stage in range(len(self._free_at)):
            seconds = cost * self._random.uniform(1.0 - self._jitter, 1.0 + self._jitter)
            self._free_at[stage] = max(borders[-1], self._free_at[stage]) + seconds
            self.busy_seconds[stage] += seconds
            borders.append(self._free_at[stage])
        results: list[RowResult] = []
        longest = cost * (1.0 + self._jitter)
        self._computing.append((plan, results))

        def execute() -> None:
            """Borders of two plans may be the same instant, but for its last bit: the order is that of the launches."""
            while self.alive and self._computing and self._computing[0][0].plan_id <= plan.plan_id:
                first, its_results = self._computing.popleft()
                its_results.extend(self._execute(row) for row in first.rows)

        def finish() -> None:
            if self.alive:
                self.unresolved -= 1
                del self.in_flight[plan.plan_id]
                self._deliver(PlanResolved(plan.plan_id, tuple(results), longest))

        border = self._border if self._border is not None else self._random.randint(0, 1)
        self._later(borders[border] - self.now, execute)
        self._later(borders[-1] - self.now, finish)

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

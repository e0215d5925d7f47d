"""A device without a model, on the engine's own compute thread: each token is the one before it plus one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tandem.core.messages.plans import Plan, PlanResolved, Row, RowResult
from tandem.core.messages.sampling import TokenLogprob
from tandem.engine.compute_thread import ComputeThread


class CountingDevice:
    """Obeys engine.device.Device. `before` is called on the compute thread ahead of every plan; it may raise."""

    def __init__(self, vocab_size: int, seconds: float = 0.0, before: Callable[[Plan], None] | None = None) -> None:
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._before = before
        self._last: dict[int, int] = {}  # by slot: the last token that was sampled
        self._thread = ComputeThread(self._execute)
        self.plans: list[Plan] = []
        self.adopted: list[int] = []

    @property
    def unresolved(self) -> int:
        return self._thread.unresolved

    def launch(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._thread.launch(plan)

    def adopt(self, pages: Sequence[int]) -> None:
        self.adopted += pages

    def fileno(self) -> int:
        return self._thread.fileno()

    def resolved(self) -> list[PlanResolved]:
        return self._thread.resolved()

    def close(self) -> None:
        self._thread.close()

    def _execute(self, thread: ComputeThread) -> None:
        while isinstance(plan := thread.take(block=True), Plan):
            if self._before is not None:
                self._before(plan)
            if self._seconds:
                time.sleep(self._seconds)
            thread.give(PlanResolved(plan.plan_id, tuple(self._row(row) for row in plan.rows), self._seconds))

    def _row(self, row: Row) -> RowResult:
        if row.sample is None:
            return RowResult()
        last = row.token_ids[-1] if row.token_ids else self._last[row.slot]
        token_id = (last + 1) % self._vocab_size
        self._last[row.slot] = token_id
        wanted = row.sample.params.logprobs is not None
        return RowResult(token_id, TokenLogprob(token_id, -0.5) if wanted else None)

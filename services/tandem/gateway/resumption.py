"""Whether and when an answer that lost its worker goes on at another one: causes, bounds, and the wait for a worker.

Not here: what is submitted then (`dispatch`), and the output that the client has (`journal`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tandem.errors import Draining, NoWorker, Overloaded, PeerLost, TandemError, Unavailable
from tandem.gateway.dispatch import Assignment
from tandem.gateway.resumption_budget import ResumptionBudget

# How long an answer waits for a worker that can take it: about what the restart of a small one takes. No setting:
# within the request's deadline a longer silence tells the client nothing that an error would not tell it sooner.
WORKER_WAIT_SECONDS = 15.0
# A worker that failed this answer is asked again only if no other one is there after so long.
SAME_WORKER_SECONDS = 1.0


class Cause(Enum):
    """Why an answer needs another worker. A failed hand-off is none: decode has its remedies, computing it at last."""

    WORKER_LOST = "worker_lost"  # its session broke
    DRAINED = "drained"  # it stops
    REFUSED = "refused"  # it had no room


class Bound(Enum):
    """Why it gets none: which bound was met."""

    LIMIT = "limit"  # gateway.max_resumptions
    BUDGET = "budget"  # gateway.resumption_burst and .resumptions_per_second
    NO_WORKER = "no_worker"  # none came within WORKER_WAIT_SECONDS
    DEADLINE = "deadline"  # none came within the request's deadline


class ResumptionCounters(Protocol):
    """Who counts; the words are values of Cause and Bound."""

    def resumed(self, cause: str) -> None: ...

    def resumption_refused(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumptionRules:
    """What holds for every answer of a gateway."""

    max_resumptions: int
    budget: ResumptionBudget
    counters: ResumptionCounters


def cause_of(error: TandemError, *, by_session: bool) -> Cause | None:
    """Return why `error` calls for another worker; None where another one would fail as well.

    `by_session`: this end of the session made it, not the worker; Overloaded is then a client that does not read.
    """
    if isinstance(error, Overloaded):
        return None if by_session else Cause.REFUSED
    if isinstance(error, Draining):
        return Cause.DRAINED
    return Cause.WORKER_LOST if isinstance(error, Unavailable) else None


class Resumption:
    """One answer's ways to other workers. `lose` begins one, `advance` goes it, `cancel` ends it early.

    `dispatch(excluded)` submits to a worker whose life is not among `excluded`; `watch(notify)` asks for news of the
    fleet and returns what ends that. While `pending`, `notify` is called when `advance` should be.
    """

    def __init__(
        self,
        rules: ResumptionRules,
        *,
        dispatch: Callable[[frozenset[bytes]], Assignment],
        watch: Callable[[Callable[[], None]], Callable[[], None]],
        notify: Callable[[], None],
        seconds_left: Callable[[], float],
    ) -> None:
        self._rules = rules
        self._dispatch = dispatch
        self._watch = watch
        self._notify = notify
        self._seconds_left = seconds_left
        self._loop = asyncio.get_running_loop()
        self._failed: frozenset[bytes] = frozenset()  # lives of workers that failed this answer
        self._count = 0
        self._cause = Cause.WORKER_LOST
        self._error: TandemError | None = None
        self._waits = False
        self._any_worker = False
        self._given_up: Bound | None = None
        self._to_cancel: list[Callable[[], object]] = []

    @property
    def pending(self) -> bool:
        """Whether the answer has no worker and waits for one."""
        return self._error is not None

    def lose(self, error: TandemError, cause: Cause, instance_id: bytes, *, waits: bool) -> None:
        """The worker of that life failed the answer. Raises `error` where a bound forbids another one.

        `waits`: an answer that nobody has room for waits for a worker, too.
        """
        self._failed |= {instance_id}
        self._cause = cause
        self._error = error
        self._waits = waits
        self._any_worker = False
        self._given_up = None
        if self._count >= self._rules.max_resumptions:
            self._refuse(Bound.LIMIT)
        if self._seconds_left() <= 0:
            self._refuse(Bound.DEADLINE)
        if not self._rules.budget.take():
            self._refuse(Bound.BUDGET)
        self._count += 1

    def advance(self) -> Assignment | None:
        """Return the new assignment, or None if there is no worker yet; raises what the last one failed with."""
        try:
            assignment = self._dispatch(frozenset() if self._any_worker else self._failed)
        except (NoWorker, PeerLost, Overloaded):
            if self._given_up is not None:
                self._refuse(self._given_up)
            if not self._waits:
                self._refuse(Bound.NO_WORKER)
            self._wait()
            return None
        self._rules.counters.resumed(self._cause.value)
        self.cancel()
        return assignment

    def cancel(self) -> None:
        """Wait no longer. Harmless at any time."""
        self._error = None
        for cancel in self._to_cancel:
            cancel()
        self._to_cancel.clear()

    def _wait(self) -> None:
        if self._to_cancel:
            return
        left = self._seconds_left()
        bound = Bound.DEADLINE if left < WORKER_WAIT_SECONDS else Bound.NO_WORKER
        self._to_cancel = [
            self._watch(self._notify),
            self._loop.call_later(SAME_WORKER_SECONDS, self._allow_any).cancel,
            self._loop.call_later(min(WORKER_WAIT_SECONDS, left), self._give_up, bound).cancel,
        ]

    def _allow_any(self) -> None:
        self._any_worker = True
        self._notify()

    def _give_up(self, bound: Bound) -> None:
        self._given_up = bound
        self._notify()

    def _refuse(self, bound: Bound) -> None:
        error = self._error
        assert error is not None
        self._rules.counters.resumption_refused(bound.value)
        self.cancel()
        raise error

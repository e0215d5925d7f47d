"""A model that several ranks share, as one device: a plan goes to all of them, and is resolved when all are done.

Nothing here makes the loop wait. A rank that is lost, or that does not get on with a plan, comes out of `resolved`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.messages.plans import Plan, PlanResolved, RowResult
from tandem.engine.device import MAX_UNRESOLVED, Device, DeviceFailed
from tandem.engine.wire import CollectiveFailed
from tandem.worker.followers import Followers, RankLost


@dataclass(slots=True)
class _InFlight:
    plan_id: int
    began: float  # launched, or first in the queue
    missing: set[int]  # ranks that have not executed it
    rows: tuple[RowResult, ...] = ()
    seconds: float = 0.0  # of the slowest rank


class RankedDevice:
    """See `device.Device`. Owns rank 0's own device and the followers. `drawing_rank` has the results.

    A plan that is not executed within `stuck_seconds` by all counts as the loss of those that have not.
    """

    def __init__(self, local: Device, followers: Followers, drawing_rank: int, stuck_seconds: float) -> None:
        self._local = local
        self._followers = followers
        self._drawing_rank = drawing_rank
        self._stuck_seconds = stuck_seconds
        self._ranks = frozenset((0, *(follower.rank for follower in followers)))
        self._plans: deque[_InFlight] = deque()
        self._broken = False
        self._closed = threading.Event()
        self._overdue = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        followers.watch(local.fileno())
        followers.watch(self._overdue)
        threading.Thread(target=self._watch, name="stuck ranks", daemon=True).start()

    @property
    def unresolved(self) -> int:
        return len(self._plans)

    def launch(self, plan: Plan) -> None:
        assert len(self._plans) < MAX_UNRESOLVED, "the loop launches without taking results"
        self._plans.append(_InFlight(plan.plan_id, time.monotonic(), set(self._ranks)))
        self._local.launch(plan)
        try:
            self._followers.send(plan)
        except BaseException:
            self._broken = True
            raise

    def adopt(self, pages: Sequence[int]) -> None:
        """Rank 0's own pool only: each follower learns of its pages from its own transfer process."""
        self._local.adopt(pages)

    def fileno(self) -> int:
        return self._followers.fileno()

    def resolved(self) -> list[PlanResolved]:
        """Take the results that are there. Raises RankLost, or DeviceFailed for a fault of rank 0's own."""
        try:
            self._take()
        except BaseException:
            self._broken = True
            raise
        done: list[PlanResolved] = []
        while self._plans and not self._plans[0].missing:
            plan = self._plans.popleft()
            done.append(PlanResolved(plan.plan_id, plan.rows, plan.seconds))
            if self._plans:
                self._plans[0].began = time.monotonic()
        return done

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._followers.close(at_once=self._broken)
        if not self._broken:  # else its thread may wait for ranks that are no more, until the process ends
            self._local.close()

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._overdue)
        try:
            for resolved in self._local.resolved():
                self._executed(0, resolved)
        except DeviceFailed as error:
            if isinstance(error.__cause__, CollectiveFailed):
                raise self._followers.reason(error.__cause__) from error
            raise
        for rank, resolved in self._followers.receive():
            self._executed(rank, resolved)
        oldest = self._plans[0] if self._plans else None
        if oldest is not None and oldest.missing and self._is_overdue(oldest):
            ranks = ", ".join(map(str, sorted(oldest.missing)))
            stuck = RankLost(
                f"plan {oldest.plan_id} was not executed within {self._stuck_seconds:g} s by ranks {ranks}"
            )
            raise self._followers.reason(stuck)

    def _executed(self, rank: int, resolved: PlanResolved) -> None:
        plan = next(plan for plan in self._plans if plan.plan_id == resolved.plan_id)
        plan.missing.remove(rank)
        plan.seconds = max(plan.seconds, resolved.device_seconds)
        if rank == self._drawing_rank:
            plan.rows = resolved.rows

    def _is_overdue(self, plan: _InFlight) -> bool:
        return time.monotonic() - plan.began > self._stuck_seconds

    def _watch(self) -> None:
        """Wake the loop when a plan is overdue: nothing else may happen any more."""
        while not self._closed.wait(min(1.0, self._stuck_seconds / 4)):
            try:
                oldest = self._plans[0]
            except IndexError:
                continue
            if self._is_overdue(oldest):
                os.eventfd_write(self._overdue, 1)

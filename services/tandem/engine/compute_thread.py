"""The thread that executes plans, and the two queues between it and the loop. It knows no torch."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable

from tandem.core.messages.plans import Plan, PlanResolved
from tandem.engine.device import MAX_UNRESOLVED, DeviceFailed, GradientsResolved, GradientWork

_JOIN_SECONDS = 60.0

Work = Plan | GradientWork | Callable[[], None]


class ComputeThread:
    """Feeds plans and other work to `execute` in order. All methods are for the loop's thread.

    `execute` runs on the compute thread: it takes work from `take` until that returns None, and hands every result to
    `give`. An exception that leaves it ends the thread and comes out of `resolved`.
    """

    def __init__(self, execute: Callable[[ComputeThread], None]) -> None:
        self._execute = execute
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._results: deque[PlanResolved | DeviceFailed] = deque()
        self._gradients: deque[GradientsResolved] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._current_plan_id = -1
        self._stopping = False
        self.unresolved = 0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def launch(self, plan: Plan) -> None:
        assert self.unresolved < MAX_UNRESOLVED, "the loop launches without taking results"
        self.unresolved += 1
        self._work.put(plan)

    def post(self, action: Callable[[], None]) -> None:
        """Run something between the plans launched before and those launched after."""
        self._work.put(action)

    def launch_gradients(self, work: GradientWork) -> None:
        self._work.put(work)

    def gradients_resolved(self) -> list[GradientsResolved]:
        taken: list[GradientsResolved] = []
        while self._gradients:
            taken.append(self._gradients.popleft())
        return taken

    def fileno(self) -> int:
        return self._event

    def resolved(self) -> list[PlanResolved]:
        # The signal is taken before the results: one that arrives in between is signalled anew.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        taken: list[PlanResolved] = []
        while self._results:
            result = self._results[0]
            if isinstance(result, DeviceFailed):
                os.eventfd_write(self._event, 1)  # stays readable: the failure is there for good
                if taken:
                    break
                raise result
            taken.append(result)
            self._results.popleft()
        self.unresolved -= len(taken)
        return taken

    def close(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._work.put(None)
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            os.close(self._event)

    # ---- on the compute thread -------------------------------------------------------------------------------------

    def take(self, *, block: bool) -> Work | None:
        """The next work; None to stop, or, without `block`, if there is none yet."""
        if self._stopping:
            return None
        try:
            work = self._work.get(block)
        except queue.Empty:
            return None
        if self._stopping:
            return None
        if isinstance(work, Plan):
            self._current_plan_id = work.plan_id
        return work

    def give(self, result: PlanResolved) -> None:
        self._put(result)

    def give_gradients(self, result: GradientsResolved) -> None:
        self._gradients.append(result)
        os.eventfd_write(self._event, 1)

    def _run(self) -> None:
        try:
            self._execute(self)
        except BaseException as error:
            self._put(DeviceFailed(self._current_plan_id, error))

    def _put(self, result: PlanResolved | DeviceFailed) -> None:
        self._results.append(result)
        os.eventfd_write(self._event, 1)

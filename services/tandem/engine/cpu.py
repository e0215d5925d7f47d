"""The CPU as a device: one thread executes plans; torch's own threads work inside of its operators."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tandem.core.messages.plans import Plan, PlanResolved
from tandem.engine.compute_thread import ComputeThread
from tandem.engine.runner import PlanRunner


class CpuDevice:
    """See `device.Device`. Takes ownership of the runner: nobody else may use it until `close`."""

    def __init__(self, runner: PlanRunner, num_threads: int) -> None:
        self._runner = runner
        self._num_threads = num_threads
        self._thread = ComputeThread(self._execute)

    @property
    def unresolved(self) -> int:
        return self._thread.unresolved

    def launch(self, plan: Plan) -> None:
        self._thread.launch(plan)

    def adopt(self, pages: Sequence[int]) -> None:
        """Nothing to do: the pool is the memory that transfers write to."""

    def fileno(self) -> int:
        return self._thread.fileno()

    def resolved(self) -> list[PlanResolved]:
        return self._thread.resolved()

    def close(self) -> None:
        self._thread.close()

    def _execute(self, thread: ComputeThread) -> None:
        torch.set_num_threads(self._num_threads)  # counts for the calling thread
        with torch.inference_mode():
            while isinstance(plan := thread.take(block=True), Plan):
                began = time.perf_counter() - self._runner.waited_seconds
                rows = self._runner.run(plan)
                seconds = time.perf_counter() - self._runner.waited_seconds - began
                thread.give(PlanResolved(plan.plan_id, rows, seconds))

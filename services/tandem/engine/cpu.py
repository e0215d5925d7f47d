"""The CPU as a device: one thread executes plans; torch's own threads work inside of its operators."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tandem.core.messages.plans import Plan, PlanResolved
from tandem.engine.compute_thread import ComputeThread
from tandem.engine.device import GradientsResolved, GradientWork
from tandem.engine.launch_mode import inference_launch, run_with_gradients
from tandem.engine.runner import PlanRunner


class CpuDevice:
    """See `device.Device`. Takes ownership of the runner: nobody else may use it until `close`.

    Plans run with `plan_threads` torch threads, gradients with `num_threads`: operators that have threads of their own
    rest meanwhile.
    """

    def __init__(self, runner: PlanRunner, *, num_threads: int, plan_threads: int) -> None:
        self._runner = runner
        self._num_threads = num_threads
        self._plan_threads = plan_threads
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

    def launch_gradients(self, work: GradientWork) -> None:
        self._thread.launch_gradients(work)

    def gradients_resolved(self) -> list[GradientsResolved]:
        return self._thread.gradients_resolved()

    def close(self) -> None:
        self._thread.close()

    def _execute(self, thread: ComputeThread) -> None:
        torch.set_num_threads(self._plan_threads)  # counts for the calling thread
        while (work := thread.take(block=True)) is not None:
            if isinstance(work, Plan):
                began = time.perf_counter() - self._runner.waited_seconds
                with inference_launch():
                    rows = self._runner.run(work)
                seconds = time.perf_counter() - self._runner.waited_seconds - began
                thread.give(PlanResolved(work.plan_id, rows, seconds))
            elif isinstance(work, GradientWork):
                torch.set_num_threads(self._num_threads)
                thread.give_gradients(run_with_gradients(work, torch.device("cpu")))
                torch.set_num_threads(self._plan_threads)
            else:
                with inference_launch():
                    work()

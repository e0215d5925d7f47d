"""A CUDA GPU as a device: plans are issued one ahead, KV pages travel through a pinned ring.

It runs the same operators as the CPU. The GPU's pool has a mirror in shared memory, page for page, which the transfer
process reads and writes; so the host needs as much memory as the pool takes on the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tandem.core.messages.plans import Plan, PlanResolved, Row
from tandem.engine.compute_thread import ComputeThread
from tandem.engine.device import GradientsResolved, GradientWork
from tandem.engine.launch_mode import inference_launch, run_with_gradients
from tandem.engine.runner import Launched, PlanRunner
from tandem.engine.staging import StagingRing

_AHEAD = 1  # plans issued while an earlier one is not finished


@dataclass(frozen=True, slots=True)
class _InFlight:
    launched: Launched  # its tokens are in pinned memory once `ended` has happened
    began: torch.cuda.Event
    ended: torch.cuda.Event


class CudaDevice:
    """See `device.Device`. Takes ownership of the runner, whose pool is `pool`; `mirror` views the shared memory."""

    def __init__(self, runner: PlanRunner, pool: torch.Tensor, mirror: torch.Tensor) -> None:
        self._runner = runner
        self._device = pool.device
        self._page_tokens = pool.shape[4]
        self._ring = StagingRing(pool, mirror)
        self._thread = ComputeThread(self._execute)

    @property
    def unresolved(self) -> int:
        return self._thread.unresolved

    def launch(self, plan: Plan) -> None:
        self._thread.launch(plan)

    def adopt(self, pages: Sequence[int]) -> None:
        """Copy pages that a transfer has filled to the GPU, before the plans launched later."""
        numbers = tuple(pages)
        self._thread.post(lambda: self._ring.adopt(numbers))

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

    # ---- on the compute thread -------------------------------------------------------------------------------------

    def _execute(self, thread: ComputeThread) -> None:
        in_flight: deque[_InFlight] = deque()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.default_stream(self._device))  # the weights are there
        with torch.cuda.stream(stream):
            while True:
                work = thread.take(block=not in_flight)
                if isinstance(work, GradientWork):
                    thread.give_gradients(run_with_gradients(work, self._device))
                    continue
                if work is None and not in_flight:
                    return
                with inference_launch():
                    if isinstance(work, Plan):
                        in_flight.append(self._issue(work))
                        if len(in_flight) > _AHEAD:
                            thread.give(self._finish(in_flight.popleft()))
                    elif work is not None:
                        work()
                    else:
                        thread.give(self._finish(in_flight.popleft()))

    def _issue(self, plan: Plan) -> _InFlight:
        stream = torch.cuda.current_stream(self._device)
        began, ended = (_timed_event(), _timed_event())
        began.record(stream)
        launched = self._runner.launch(plan)
        tokens = torch.empty(launched.tokens.shape, dtype=launched.tokens.dtype, pin_memory=True)
        tokens.copy_(launched.tokens, non_blocking=True)
        ended.record(stream)
        return _InFlight(replace(launched, tokens=tokens), began, ended)

    def _finish(self, done: _InFlight) -> PlanResolved:
        plan = done.launched.plan
        pages = [page for row in plan.rows for page in _published_pages(row, self._page_tokens)]
        self._ring.publish(pages, done.ended)
        done.ended.synchronize()
        seconds = done.began.elapsed_time(done.ended) / 1e3
        return PlanResolved(plan.plan_id, self._runner.finish(done.launched), seconds)


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _published_pages(row: Row, page_tokens: int) -> tuple[int, ...]:
    """Pages that a row wrote and that may be announced. Decode rows are never handed off, so theirs stay on the GPU."""
    if row.num_tokens == 1 and row.sample is not None and not row.zero_tail:
        return ()
    end = row.start + row.num_tokens
    return row.pages[row.start // page_tokens : -(-end // page_tokens)]

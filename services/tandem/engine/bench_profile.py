"""Where the time of a step goes: repetitions with the operators' profiler on, beside the floors of the parts.

The times that a report quotes are measured without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.messages.plans import Row
from tandem.engine.bench_limits import Probes, Work
from tandem.engine.bench_plans import TimedPlans
from tandem.engine.ops.contract import KindTime, Profiler

OUTSIDE = "outside"  # of the operators: launch, making of batch and program, sampling
_REPETITIONS_MAX = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTime:
    """One kind of operations in a step. `waited_seconds`: of it, what a thread had no task for, on average of all.

    `share` is that of the step. `floor_seconds`: None for what has no floor of its own.
    """

    kind: str
    seconds: float
    share: float
    waited_seconds: float
    floor_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """The median one of several profiled steps; its parts add up to `seconds`."""

    seconds: float
    parts: tuple[PartTime, ...]
    repetitions: int


class StepProfiler:
    """Profiles steps of the device that `plans` drives; `seconds_max` bounds the time that one profile may take."""

    def __init__(self, profiler: Profiler, plans: TimedPlans, probes: Probes, seconds_max: float) -> None:
        self._profiler = profiler
        self._plans = plans
        self._probes = probes
        self._seconds_max = seconds_max

    def profile(self, plans: Sequence[Sequence[Row]], works: Sequence[dict[str, Work]], expected: float) -> StepProfile:
        """Run the plans some times, at least once; `expected` seconds each. `works` has their parts' work."""
        count = max(1, min(_REPETITIONS_MAX, int(self._seconds_max / expected)))
        before = self._probes.measure()
        self._profiler.start()
        try:
            steps = [(self._plans.seconds(plans), self._profiler.take()) for _ in range(count)]
        finally:
            self._profiler.stop()
        after = self._probes.measure()
        floors: dict[str, float] = {}
        for work in works:
            for rates in (before, after):
                for kind, seconds in rates.part_floors(work).items():
                    floors[kind] = floors.get(kind, 0.0) + seconds / 2
        seconds, kinds = sorted(steps, key=lambda step: step[0])[(count - 1) // 2]
        return step_profile(seconds, kinds, floors, count)


def step_profile(seconds: float, kinds: Sequence[KindTime], floors: dict[str, float], repetitions: int) -> StepProfile:
    """A step of `seconds`, of which the operators' kinds took theirs; kinds that took no time are left out."""
    outside = KindTime(OUTSIDE, max(0.0, seconds - sum(kind.seconds for kind in kinds)), 0.0)
    parts = tuple(
        PartTime(
            kind=kind.kind,
            seconds=kind.seconds,
            share=kind.seconds / seconds,
            waited_seconds=kind.waited_seconds,
            floor_seconds=floors.get(kind.kind),
        )
        for kind in (*kinds, outside)
        if kind.seconds > 0
    )
    return StepProfile(seconds=seconds, parts=parts, repetitions=repetitions)

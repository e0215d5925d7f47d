"""What the event loop does beside its plans: chores, and trainings where the worker takes them."""

from __future__ import annotations

from tandem.core.scheduler import Scheduler
from tandem.worker.chores import Chores
from tandem.worker.training_desk import TrainingDesk


class ChoresAndTraining:
    """Both, for `loop.run`."""

    def __init__(self, chores: Chores, desk: TrainingDesk) -> None:
        self._chores = chores
        self._desk = desk

    def next_due(self) -> float:
        """When `run` wants to be called again."""
        due = self._desk.next_due()
        return self._chores.next_due() if due is None else min(due, self._chores.next_due())

    def run(self, scheduler: Scheduler, *, happened: bool, idle: bool, now: float) -> None:
        """Do what is due; see `Chores.run`."""
        self._chores.run(scheduler, happened=happened, idle=idle, now=now)
        self._desk.run(scheduler, idle=idle, now=now)

"""The event loop of a worker's rank 0: one function for every role and pacing. It blocks when there is nothing to do.

What is rare or for people - figures, the idle self-check - is the `chores`' matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tandem.core.scheduler import Scheduler, Tick
from tandem.engine.device import Device

_TICK = [Tick()]


class Ports(Protocol):
    """Where events come from and effects go to."""

    def wait(self, until: float | None) -> list[object]:
        """Block until something happens, or the clock is at `until`; return the events, in order."""

    def flush(self, effects: list[object]) -> None:
        """Send effects on; never blocks."""


class Beside(Protocol):
    """What is done beside the plans: chores, and trainings."""

    def next_due(self) -> float:
        """When `run` wants to be called again."""

    def run(self, scheduler: Scheduler, *, happened: bool, idle: bool, now: float) -> None:
        """Do what is due, after every turn of the loop; see `Chores.run`."""


def run(
    scheduler: Scheduler, device: Device, ports: Ports, clock: Callable[[], float], depth: int, chores: Beside
) -> None:
    """Serve until the scheduler has been told to drain and nothing is left.

    `depth`: launched plans that may be unresolved while the next one is planned.
    """
    while not scheduler.finished():
        timer = scheduler.next_timer()
        events = ports.wait(_earlier(timer, chores.next_due()))
        ticked = timer is not None and timer <= clock()
        for event in events or _TICK:
            scheduler.handle(event, clock())
        while device.unresolved <= depth and (plan := scheduler.plan(clock())):
            device.launch(plan)
        effects = scheduler.drain_effects()
        ports.flush(effects)
        chores.run(scheduler, happened=ticked or bool(events or effects), idle=device.unresolved == 0, now=clock())


def _earlier(first: float | None, second: float | None) -> float | None:
    return min((moment for moment in (first, second) if moment is not None), default=None)

"""What a worker's loop sees of a device: plans go in, results come out in the same order, nothing blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.core.messages.plans import Plan, PlanResolved

MAX_UNRESOLVED = 64  # launched plans; far above any loop's depth


class DeviceFailed(Exception):
    """A plan could not be executed. The cause is the compute thread's exception; the device executes nothing more."""

    def __init__(self, plan_id: int, cause: BaseException) -> None:
        super().__init__(f"plan {plan_id} failed on the device: {type(cause).__name__}: {cause}")
        self.plan_id = plan_id
        self.__cause__ = cause


class Device(Protocol):
    @property
    def unresolved(self) -> int:
        """Launched plans whose PlanResolved was not yet taken."""
        ...

    def launch(self, plan: Plan) -> None:
        """Queue a plan. Plans are executed in the order of their launch; at most MAX_UNRESOLVED may be unresolved."""
        ...

    def adopt(self, pages: Sequence[int]) -> None:
        """Say that a transfer has filled these pages of `memory`; plans launched later see what it brought."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable while results wait."""
        ...

    def resolved(self) -> list[PlanResolved]:
        """Take the results that are there, in order. Raises DeviceFailed once those before a failed plan are taken."""
        ...

    def close(self) -> None:
        """Stop after the plan that is being executed; plans behind it are dropped."""
        ...


@dataclass(frozen=True, slots=True)
class GradientWork:
    """A launch that needs gradients. `run` is called on the compute thread, under autograd, between two plans."""

    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class GradientsResolved:
    """What a GradientWork returned, or the exception that it ended with; a device goes on after one."""

    value: object
    error: Exception | None
    device_seconds: float


class GradientDevice(Device, Protocol):
    """A device that runs launches of both kinds. The mode belongs to the launch, not to the process."""

    def launch_gradients(self, work: GradientWork) -> None:
        """Queue work behind the plans launched so far; it does not count as unresolved."""
        ...

    def gradients_resolved(self) -> list[GradientsResolved]:
        """Take what has ended, in order. `fileno` turns readable for it, too."""
        ...

"""What a worker's loop sees of a device: plans go in, results come out in the same order, nothing blocks."""

from __future__ import annotations

from collections.abc import Sequence
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

"""How many answers may go on at another worker: a token bucket over all requests. Pure; the clock is given.

Without it, a fleet whose workers die of what they are asked would be asked it again and again.
"""

from __future__ import annotations

from collections.abc import Callable


class ResumptionBudget:
    """Holds at most `burst`, and is full at first; `per_second` come back. `clock` returns monotonic seconds."""

    def __init__(self, burst: int, per_second: float, clock: Callable[[], float]) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._left = float(burst)
        self._counted_at = clock()

    def take(self) -> bool:
        """Take one; False if there is none."""
        now = self._clock()
        self._left = min(self._burst, self._left + max(0.0, now - self._counted_at) * self._per_second)
        self._counted_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

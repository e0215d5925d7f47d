"""How long a drain has taken, and how long it may take. Not here: draining."""

from __future__ import annotations

import time
from collections.abc import Callable


class DrainClock:
    """Zero until `begin`. Read by the exporter's threads, written by the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        self._limit_seconds = 0.0

    def begin(self, limit_seconds: float) -> None:
        """The drain has begun; after `limit_seconds` what is left is cut."""
        if self._began is None:
            self._limit_seconds = limit_seconds
            self._began = self._clock()

    def seconds(self) -> float:
        """Return for how long it has drained."""
        return self._clock() - self._began if self._began is not None else 0.0

    def limit_seconds(self) -> float:
        """Return how long it may take; 0 while it does not drain."""
        return self._limit_seconds

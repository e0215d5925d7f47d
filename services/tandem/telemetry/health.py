"""What liveness and readiness probes are told. Not here: the servers that tell it (`exporter`, rpc.server).

Liveness is about this process only, never about peers: a fault means that a restart is the remedy. The event loop
beats once a second; a process whose loop has stopped cannot say so itself, therefore the probe's own thread looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

BEAT_SECONDS = 1.0
STUCK_SECONDS = 30.0  # a loop that has not come round for so long will not


class Health:
    """The state behind /livez and /readyz. Read by the threads of a server, written by the event loop."""

    def __init__(
        self,
        not_ready: Callable[[], str],
        faults: Callable[[], str] = lambda: "",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`not_ready` says why no new work is welcome, `faults` why only a restart helps; empty: all is well.

        Both are called from other threads, and must only read.
        """
        self._not_ready = not_ready
        self._faults = faults
        self._clock = clock
        self._beaten = clock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Beat from now on; call it in the event loop."""
        self._task = asyncio.create_task(self._beat(), name="health beat")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    @property
    def loop_lag_seconds(self) -> float:
        """How long the event loop is late with its beat."""
        return max(0.0, self._clock() - self._beaten - BEAT_SECONDS) if self._task is not None else 0.0

    def fault(self) -> str:
        """Return why this process has to be restarted, or nothing."""
        if self.loop_lag_seconds > STUCK_SECONDS:
            return f"the event loop has not run for {self._clock() - self._beaten:.0f} s"
        return self._faults()

    def not_ready(self) -> str:
        """Return why this process takes no new work, or nothing."""
        return self.fault() or self._not_ready()

    async def _beat(self) -> None:
        while True:
            self._beaten = self._clock()
            await asyncio.sleep(BEAT_SECONDS)

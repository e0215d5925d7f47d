"""One-sided engines with their landing rings, kept while nobody uses them.

Destroying a Mooncake engine takes a second, with the GIL held: every other pull of the process would wait. So a clean
engine is used again, for any peer, and one that failed is parked together with its ring, where it may write as it
likes. Only beyond MAX_PARKED the oldest is destroyed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tandem.transfer.landing_ring import LandingRing
from tandem.transfer.one_sided import ReadEngine

MAX_PARKED = 16


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """An engine and the only memory that it may write to."""

    engine: ReadEngine
    ring: LandingRing


class EnginePool:
    """Thread-safe. The number of engines in use is bounded by whoever takes them."""

    def __init__(self, new_engine: Callable[[], ReadEngine]) -> None:
        self._new_engine = new_engine
        self._lock = threading.Lock()
        self._spare: list[Landing] = []
        self._parked: deque[Landing] = deque()

    @property
    def num_spare(self) -> int:
        return len(self._spare)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def take(self) -> Landing:
        """Return a clean engine with a registered ring, all slots free; may take seconds. Raises TransportError."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        landing = Landing(self._new_engine(), LandingRing())
        landing.engine.register(landing.ring.address, landing.ring.num_bytes)
        return landing

    def give_back(self, landing: Landing, has_failed: bool) -> None:
        """Take it back: for reuse only if nothing failed and every read into the ring ended in success."""
        oldest: Landing | None = None
        with self._lock:
            if not has_failed and landing.ring.is_free:
                self._spare.append(landing)
                return
            self._parked.append(landing)
            if len(self._parked) > MAX_PARKED:
                oldest = self._parked.popleft()
        if oldest is not None:
            oldest.engine.close()  # before the last reference to its ring goes

    def close(self) -> None:
        """Destroy all that is not in use."""
        with self._lock:
            landings = [*self._spare, *self._parked]
            self._spare.clear()
            self._parked.clear()
        for landing in landings:
            landing.engine.close()

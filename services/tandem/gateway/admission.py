"""The bound on what one gateway does at once. No queue: what is too much is refused, and may come again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tandem.errors import Overloaded

RETRY_SECONDS = 1.0


class Admission:
    """Counts sequences (a request with n answers is n)."""

    def __init__(self, max_inflight: int) -> None:
        self._max_inflight = max_inflight
        self.inflight = 0

    @contextmanager
    def admit(self, num_sequences: int = 1) -> Iterator[None]:
        """Hold room for the duration; raises Overloaded if there is none."""
        if self.inflight + num_sequences > self._max_inflight:
            raise Overloaded(
                f"{self.inflight} requests are running, at most {self._max_inflight} may",
                reason="GATEWAY_FULL",
                retry_after_seconds=RETRY_SECONDS,
            )
        self.inflight += num_sequences
        try:
            yield
        finally:
            self.inflight -= num_sequences

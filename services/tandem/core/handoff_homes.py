"""Which replica of a prefill worker has which hand-off: later attempts of an id must find the pages of the first.

The frontend is not told when a hand-off ends without a stream (its lease is the scheduler's matter), so an id is
remembered after its last stream for as long as the scheduler may know it: a lease, and its memory of ended ids.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_REMEMBERED = 1 << 16  # ids without a stream; the oldest is forgotten first


@dataclass(slots=True)
class _Home:
    replica: int
    streams: int = 0


class HandoffHomes:
    """Homes by hand-off id, and by stream while one is open. Time is monotonic seconds, given with every call."""

    def __init__(self, remember_seconds: float) -> None:
        self._remember_seconds = remember_seconds
        self._homes: dict[bytes, _Home] = {}
        self._by_stream: dict[int, bytes] = {}
        self._until: OrderedDict[bytes, float] = OrderedDict()  # of ids without a stream, oldest first

    def __len__(self) -> int:
        return len(self._homes)

    def find(self, handoff_id: bytes, now: float) -> int | None:
        """Return the replica that has seen this hand-off; None: it is new."""
        self._forget(now)
        home = self._homes.get(handoff_id)
        return home.replica if home is not None else None

    def opened(self, handoff_id: bytes, stream_id: int, replica: int) -> None:
        """A stream of this hand-off goes to `replica`, where it belongs if it is known."""
        home = self._homes.setdefault(handoff_id, _Home(replica))
        assert home.replica == replica
        home.streams += 1
        self._by_stream[stream_id] = handoff_id
        self._until.pop(handoff_id, None)

    def of_stream(self, stream_id: int) -> tuple[bytes, int] | None:
        """Return hand-off id and replica of an open stream."""
        handoff_id = self._by_stream.get(stream_id)
        return (handoff_id, self._homes[handoff_id].replica) if handoff_id is not None else None

    def closed(self, stream_id: int, now: float) -> bool:
        """A stream is over; whether it was the last one of its hand-off. Unknown streams are over already."""
        handoff_id = self._by_stream.pop(stream_id, None)
        if handoff_id is None:
            return False
        home = self._homes[handoff_id]
        home.streams -= 1
        if home.streams:
            return False
        self._until[handoff_id] = now + self._remember_seconds
        self._forget(now)
        return True

    def _forget(self, now: float) -> None:
        while self._until and (len(self._until) > MAX_REMEMBERED or next(iter(self._until.values())) <= now):
            handoff_id, _ = self._until.popitem(last=False)
            del self._homes[handoff_id]

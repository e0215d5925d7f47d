"""What a TCP exporter serves to whom: one grant a hand-off, and which connections are sending from its pages."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tandem.core.messages.transfer import Slab
from tandem.transfer.pages import Numbers, Pages
from tandem.transfer.tcp_stream import Stream

_ABSENT = -1


@dataclass(slots=True, eq=False)
class Grant:
    """One attempt of a hand-off. `numbers[ordinal]` is its page, or absent. A piece is a slab of every page."""

    handoff_id: bytes
    attempt: int
    token: bytes
    pieces: tuple[Slab, ...]
    is_live: bool = True
    pages: Pages | None = None

    def add(self, first_ordinal: int, pages: Pages) -> None:
        known = np.empty(0, dtype=np.int64) if self.pages is None else self.pages.numbers
        end = first_ordinal + len(pages.numbers)
        numbers = np.full(max(len(known), end), _ABSENT, dtype=np.int64)
        numbers[: len(known)] = known
        numbers[first_ordinal:end] = pages.numbers
        self.pages = Pages(pages.space, numbers, pages.slab)

    def select(self, ordinals: Numbers, piece: int) -> Pages | None:
        """Return a piece of the pages of these ordinals, None if one is not announced."""
        if self.pages is None or int(ordinals.max()) >= len(self.pages.numbers) or int(ordinals.min()) < 0:
            return None
        numbers = self.pages.numbers[ordinals]
        return None if int(numbers.min()) == _ABSENT else Pages(self.pages.space, numbers, self.pieces[piece])


@dataclass(slots=True, eq=False)
class _Sending:
    """The connections inside a frame of one hand-off, in any attempt, and who waits for their end."""

    streams: set[Stream] = field(default_factory=set)
    waiting: list[Callable[[], None]] = field(default_factory=list)


class GrantTable:
    """Thread-safe. Pages are read only between `begin` and `end`, so a revocation waits for one frame at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._grants: dict[bytes, Grant] = {}
        self._sending: dict[bytes, _Sending] = {}

    def open(self, handoff_id: bytes, attempt: int, token: bytes, pieces: Sequence[Slab]) -> None:
        with self._lock:
            grant = self._grants.get(handoff_id)
            if grant is not None:
                if grant.attempt >= attempt:
                    return
                grant.is_live = False
            self._grants[handoff_id] = Grant(handoff_id, attempt, token, tuple(pieces))

    def add(self, handoff_id: bytes, attempt: int, first_ordinal: int, pages: Pages) -> None:
        with self._lock:
            grant = self._grants.get(handoff_id)
            if grant is not None and grant.attempt == attempt:
                grant.add(first_ordinal, pages)

    def select(
        self, handoff_id: bytes, attempt: int, token: bytes, ordinals: Numbers, piece: int = 0
    ) -> tuple[Grant, Pages] | str:
        """Return the grant and a piece of its pages, or why not."""
        with self._lock:
            grant = self._grants.get(handoff_id)
            if grant is None or grant.attempt != attempt or not hmac.compare_digest(grant.token, token):
                return "no such hand-off, attempt or token"  # not which: a stranger learns nothing
            if not 0 <= piece < len(grant.pieces):
                return f"this hand-off has {len(grant.pieces)} pieces"
            pages = grant.select(ordinals, piece)
        return "an ordinal is not announced" if pages is None else (grant, pages)

    def begin(self, grant: Grant, stream: Stream) -> bool:
        """Let `stream` read pages until `end`; False: the grant has ended."""
        with self._lock:
            if grant.is_live:
                self._sending.setdefault(grant.handoff_id, _Sending()).streams.add(stream)
            return grant.is_live

    def end(self, grant: Grant, stream: Stream) -> None:
        """Say that `stream` reads no more; the last one answers those who revoke."""
        with self._lock:
            sending = self._sending[grant.handoff_id]
            sending.streams.remove(stream)
            if sending.streams:
                return
            del self._sending[grant.handoff_id]
        for done in sending.waiting:
            done()

    def revoke(self, handoff_id: bytes, done: Callable[[], None]) -> None:
        """End the grant; `done` once nothing sends from its pages. A frame under way is cut off: its peer may hang."""
        with self._lock:
            grant = self._grants.pop(handoff_id, None)
            if grant is not None:
                grant.is_live = False
            sending = self._sending.get(handoff_id)
            if sending is not None:
                sending.waiting.append(done)
                for stream in sending.streams:
                    stream.shut()  # under the lock: it is inside a frame of this hand-off and of no other
                return
        done()

"""One pull on its way: what it wants, what has arrived and matched, and when it is over. No I/O, any transport."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from tandem.core.messages.transfer import PullEnded, PullStatus, RankPull
from tandem.transfer import hashing
from tandem.transfer.contract import PullDone
from tandem.transfer.pages import Pages, PageSpace

_UNKNOWN, _GOOD, _BAD = 0, 1, 2


class PullJob:
    """Thread-safe. It is over, and says so once, when no part holds it any more (`hold`, `let_go`)."""

    def __init__(self, pull: RankPull, space: PageSpace, transport: str, done: PullDone) -> None:
        self.pull = pull
        self.pages = Pages.of(space, pull.pages, pull.slab)
        self.ordinals = np.asarray(pull.ordinals, dtype=np.int64)
        self.expected = hashing.unpack(pull.checksums)
        if not len(self.pages.numbers) == len(self.ordinals) == len(self.expected) > 0:
            raise ValueError(f"pull {pull.ticket} does not add up")
        self._transport = transport
        self._done = done
        self._lock = threading.Lock()
        self._verdicts = np.full(len(self.ordinals), _UNKNOWN, dtype=np.int8)
        self._num_holds = 0
        self._failure: tuple[PullStatus, str] | None = None
        self._first_read: float | None = None

    @property
    def is_broken_off(self) -> bool:
        return self._failure is not None

    def break_off(self, status: PullStatus, message: str) -> None:
        """End it with this status as soon as nobody holds it; the first reason counts."""
        with self._lock:
            self._failure = self._failure or (status, message)

    def hold(self, count: int = 1) -> None:
        with self._lock:
            self._num_holds += count

    def let_go(self, count: int = 1) -> None:
        """Say that `count` holders cannot touch the pages any more; the last one ends the pull."""
        with self._lock:
            self._num_holds -= count
            if self._num_holds:
                return
        self._done(self._outcome())

    def note_read(self) -> None:
        """Say that bytes are being asked for: the time of a pull counts from here."""
        if self._first_read is None:
            self._first_read = time.monotonic()

    def verify(self, begin: int, end: int) -> None:
        """Compare pages [begin, end) of the pull, which have arrived, with their checksums."""
        matches = hashing.hashes(self.pages.part(begin, end)) == self.expected[begin:end]
        self._verdicts[begin:end] = np.where(matches, _GOOD, _BAD)

    def _outcome(self) -> PullEnded:
        bad = self._ordinals_with(_BAD)
        status, message = self._failure or (PullStatus.MISMATCH if bad else PullStatus.DONE, "")
        return PullEnded(
            ticket=self.pull.ticket,
            status=status,
            good_ordinals=self._ordinals_with(_GOOD),
            bad_ordinals=bad,
            num_bytes=int(np.count_nonzero(self._verdicts)) * self.pages.bytes_each,
            seconds=0.0 if self._first_read is None else time.monotonic() - self._first_read,
            transport=self._transport,
            message=message,
        )

    def _ordinals_with(self, verdict: int) -> tuple[int, ...]:
        return tuple(self.ordinals[self._verdicts == verdict].tolist())


@dataclass(slots=True, eq=False)
class Part:
    """Pages [begin, end) of a pull, read over one connection that serves nothing else meanwhile."""

    job: PullJob
    begin: int
    end: int

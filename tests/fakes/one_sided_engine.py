"""A one-sided engine that behaves as badly as real ones do: late, out of order, and writing after it said FAILED.

Remote and local memory are of this process. Whatever is still to be written when `close` is called is dropped.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.transfer.one_sided import ReadId, ReadState


@dataclass
class Behaviour:
    """Change it at any time; it counts when a read is polled, or submitted."""

    seed: int = 0
    max_polls: int = 3  # a read ends after at most so many polls
    is_frozen: bool = False  # nothing ends
    fails: Callable[[int], bool] = lambda _: False  # by the read's number: FAILED is reported, its bytes come late
    keeps_writing: bool = False  # spoils the memory of failed reads again and again, after each that succeeds
    refuses: bool = False  # submit takes nothing
    blocked: threading.Event | None = None  # submit waits for it


@dataclass(frozen=True)
class _Read:
    number: int
    local: int
    remote: int
    length: int


@dataclass
class FakeEngines:
    """Makes engines, and sees through all of them."""

    behaviour: Behaviour = field(default_factory=Behaviour)
    engines: list[FakeEngine] = field(default_factory=list)
    max_outstanding: int = 0

    def new_engine(self) -> FakeEngine:
        self.engines.append(FakeEngine(self))
        return self.engines[-1]

    def write_late(self) -> int:
        """Let the bytes of failed reads arrive now, spoilt, at every engine that lives; returns how many reads."""
        return sum(engine.write_late() for engine in self.engines)


class FakeEngine:
    def __init__(self, owner: FakeEngines) -> None:
        self._owner = owner
        self._random = random.Random(owner.behaviour.seed)
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._running: dict[ReadId, tuple[_Read, int]] = {}
        self._late: list[_Read] = []
        self._regions: list[tuple[int, int]] = []
        self.is_closed = False
        self.num_reads = 0

    def register(self, address: int, length: int) -> None:
        self._regions.append((address, length))

    def submit(self, session: str, local: int, remote: int, length: int) -> ReadId | None:
        behaviour = self._owner.behaviour
        if behaviour.blocked is not None:
            behaviour.blocked.wait()
        assert not self.is_closed
        assert any(begin <= local and local + length <= begin + size for begin, size in self._regions)
        if behaviour.refuses:
            return None
        with self._lock:
            read_id = next(self._ids)
            self._running[read_id] = (
                _Read(self.num_reads, local, remote, length),
                self._random.randint(1, behaviour.max_polls),
            )
            self.num_reads += 1
            self._owner.max_outstanding = max(self._owner.max_outstanding, len(self._running))
            return read_id

    def poll(self, read_id: ReadId) -> ReadState:
        assert not self.is_closed
        with self._lock:
            read, polls_left = self._running.pop(read_id)  # a KeyError here is a SIGSEGV there
            if self._owner.behaviour.is_frozen or polls_left > 1:
                self._running[read_id] = (read, polls_left - 1)
                return ReadState.RUNNING
            if self._owner.behaviour.fails(read.number):
                self._late.append(read)
                return ReadState.FAILED
            ctypes.memmove(read.local, read.remote, read.length)
            if self._owner.behaviour.keeps_writing:
                for failed in self._late:
                    ctypes.memset(failed.local, 0xEE, failed.length)
            return ReadState.DONE

    def write_late(self) -> int:
        with self._lock:
            if self.is_closed:
                return 0
            late, self._late = self._late, []
            for read in late:
                ctypes.memset(read.local, 0xEE, read.length)
            return len(late)

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
            self._running.clear()
            self._late.clear()

"""Slots that one-sided reads land in, never the pool: whatever arrives late harms nobody.

A slot is reused only if every read into it ended in success. Else it is lost until the ring goes with its engine.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, field

import numpy as np

from tandem.transfer.iovec import Iovecs, Runs
from tandem.transfer.one_sided import ReadId
from tandem.transfer.pull_job import PullJob

SLOT_BYTES = 4 << 20
NUM_SLOTS = 8


class LandingRing:
    """Owns the memory; it is unmapped when the last reference goes, so keep it until the engine is destroyed."""

    def __init__(self, num_slots: int = NUM_SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        self.slot_bytes = slot_bytes
        self.num_bytes = num_slots * slot_bytes
        self.memory = np.frombuffer(mmap.mmap(-1, self.num_bytes), dtype=np.uint8)
        self.address = int(self.memory.ctypes.data)
        self._free = list(range(num_slots))

    @property
    def is_free(self) -> bool:
        """Whether no slot is in use or lost."""
        return len(self._free) * self.slot_bytes == self.num_bytes

    def take(self) -> int | None:
        """Return a free slot's address."""
        return self.address + self._free.pop() * self.slot_bytes if self._free else None

    def give_back(self, slot: int) -> None:
        """Free a slot whose reads all ended in success."""
        self._free.append((slot - self.address) // self.slot_bytes)


@dataclass(slots=True, eq=False)
class Batch:
    """Stream bytes [begin, end) of a pull on their way into one slot, by one read a remote run."""

    job: PullJob
    slot: int
    begin: int
    end: int
    reads: set[ReadId] = field(default_factory=set)
    has_failed: bool = False

    def scatter(self) -> None:
        """Copy the slot into the pages."""
        source, begin, local = self.slot, self.begin, Runs.of(self.job.pages)
        while begin < self.end:
            for address, length in local.iovecs(begin, self.end).tolist():
                ctypes.memmove(address, source, length)
                source, begin = source + length, begin + length


@dataclass(frozen=True, slots=True, eq=False)
class Remote:
    """What a pull reads, where it lies at the exporter: its pool begins at `base` and is registered in arenas."""

    runs: Runs
    base: int
    arena: int

    def reads(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return (address, length) of each read that stream bytes [begin, end) take."""
        return cut_at_arenas(self.runs.iovecs(begin, end), self.base, self.arena)


def cut_at_arenas(runs: Iovecs, base: int, arena: int) -> list[tuple[int, int]]:
    """Split remote runs (address, length) where a registration ends: one read may not cross it."""
    pieces: list[tuple[int, int]] = []
    for address, length in runs.tolist():
        while length:
            room = arena - (address - base) % arena
            pieces.append((address, min(room, length)))
            address, length = address + pieces[-1][1], length - pieces[-1][1]
    return pieces

"""Slots that one-sided reads land in, never the pool: whatever arrives late harms nobody.

A slot is reused only if every read into it ended in success. Else it is lost until the ring goes with its engine.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tandem.core.messages.transfer import Slab, Source
from tandem.transfer.iovec import Iovecs, Runs
from tandem.transfer.one_sided import ReadId, arena_bytes
from tandem.transfer.pages import slab_addresses
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


class Remote:
    """What a pull reads where it lies at the exporter, whose pool begins at `base`: one byte stream, page after page.

    A piece in several runs is read from its first byte to its last, with what lies between: a read costs far more than
    the bytes of a few other heads (bench/pieces.py). So there is one read a page.
    """

    def __init__(self, numbers: npt.NDArray[np.uint64], source: Source, base: int) -> None:
        slab = source.slab
        self.bytes_each = slab.end - slab.offset
        self.num_bytes = len(numbers) * self.bytes_each
        self.slab = slab
        span = Slab(slab.offset, self.bytes_each, self.bytes_each, 1)
        self._runs = Runs(slab_addresses(numbers, base, source.page_bytes, span), self.bytes_each)
        self._base = base
        self._arena = arena_bytes(source.page_bytes)

    def reads(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return (address, length) of each read that stream bytes [begin, end) take."""
        return cut_at_arenas(self._runs.iovecs(begin, end), self._base, self._arena)

    def wanted(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Return what of stream bytes [begin, end) is of the piece: (first byte, length, its place in the piece's)."""
        slab = self.slab
        if slab.num_runs == 1:
            return [(begin, end - begin, begin)]
        found = []
        for page in range(begin // self.bytes_each, -(-end // self.bytes_each)):
            for run in range(slab.num_runs):
                first = page * self.bytes_each + run * slab.stride
                low, high = max(first, begin), min(first + slab.run_bytes, end)
                if low < high:
                    found.append((low, high - low, page * slab.num_bytes + run * slab.run_bytes + low - first))
        return found


@dataclass(slots=True, eq=False)
class Batch:
    """Bytes [begin, end) of a pull's remote stream on their way into one slot, by one read a remote run."""

    job: PullJob
    remote: Remote
    slot: int
    begin: int
    end: int
    reads: set[ReadId] = field(default_factory=set)
    has_failed: bool = False

    def scatter(self, local: Runs) -> None:
        """Copy what the piece has of the slot into the pull's pages, which are `local`."""
        for first, size, place in self.remote.wanted(self.begin, self.end):
            source, end = self.slot + first - self.begin, place + size
            while place < end:
                for address, length in local.iovecs(place, end).tolist():
                    ctypes.memmove(address, source, length)
                    source, place = source + length, place + length


def cut_at_arenas(runs: Iovecs, base: int, arena: int) -> list[tuple[int, int]]:
    """Split remote runs (address, length) where a registration ends: one read may not cross it."""
    pieces: list[tuple[int, int]] = []
    for address, length in runs.tolist():
        while length:
            room = arena - (address - base) % arena
            pieces.append((address, min(room, length)))
            address, length = address + pieces[-1][1], length - pieces[-1][1]
    return pieces

"""What a one-sided transport needs beside a session name: the address of the exporter's memory, and a probe.

The probe is a region that every exporter keeps readable beside its pool; its bytes follow from the instance id, so
that reading it proves the path and who is at its other end. No I/O here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tandem.errors import TransportError
from tandem.transfer.pages import PageSpace

PROBE_BYTES = 64 << 10
ARENA_BYTES_MAX = 1 << 30  # larger registrations are cut by some devices

ReadId = int


class ReadState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  # over for the engine; its slot is not reused all the same (a late write proves nothing)


class ReadEngine(Protocol):
    """Reads remote memory into registered memory of its own. One thread; may block, crash, and write late."""

    def register(self, address: int, length: int) -> None:
        """Raises TransportError."""

    def submit(self, session: str, local: int, remote: int, length: int) -> ReadId | None:
        """Begin one read, None if it was not taken."""

    def poll(self, read_id: ReadId) -> ReadState:
        """Never call it again for an id that was DONE or FAILED."""

    def close(self) -> None:
        """Destroy the engine: afterwards it writes nothing any more. May stop every thread for a second."""


@dataclass(frozen=True, slots=True)
class OneSidedAddress:
    """RankEndpoint.address of a one-sided transport: "session/pool/probe/control".

    `pool` and `probe` are remote addresses. `control` is the TCP address of the same process, where it proves to be
    alive before its session is named to an engine, and to which a pair falls back.
    """

    session: str
    pool: int
    probe: int
    control: str

    def encode(self) -> str:
        return f"{self.session}/{self.pool:x}/{self.probe:x}/{self.control}"

    @classmethod
    def decode(cls, text: str) -> OneSidedAddress:
        """Raises TransportError: the text came from a peer."""
        parts = text.split("/")
        try:
            session, pool, probe, control = parts
            address = cls(session, int(pool, 16), int(probe, 16), control)
        except ValueError as error:
            raise TransportError(f"{text!r} is no address of a one-sided transport") from error
        if not 0 < address.pool < 1 << 63 or not 0 < address.probe < 1 << 63:
            raise TransportError(f"{text!r} is no address of a one-sided transport")
        return address


def probe_pattern(instance_id: bytes) -> bytes:
    """Return the PROBE_BYTES that the exporter with this instance id shows."""
    return hashlib.shake_128(b"tandem-probe" + instance_id).digest(PROBE_BYTES)


def arena_bytes(page_bytes: int) -> int:
    """Return the size of the pieces that a pool is registered in: whole pages, so that no page crosses an edge."""
    return max(ARENA_BYTES_MAX // page_bytes, 1) * page_bytes


def arenas(space: PageSpace) -> list[tuple[int, int]]:
    """Return (address, length) of each piece of a pool."""
    total, size = space.num_pages * space.page_bytes, arena_bytes(space.page_bytes)
    return [(space.address + begin, min(size, total - begin)) for begin in range(0, total, size)]

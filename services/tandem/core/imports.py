"""The records of hand-offs in progress on decode: what was announced, asked for, and landed. Bookkeeping only."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.core.endpoints import choose_endpoints
from tandem.core.messages.handoff import Accepted, Announce, RankEndpoint
from tandem.core.messages.requests import PrefillPeer
from tandem.core.request import Request
from tandem.core.settings import SchedulerSettings
from tandem.core.sharding import pair_fault, pieces
from tandem.core.states import State

_CHECKSUM_BYTES = 8
_PAGE_NUMBER_BYTES = 4


@dataclass(slots=True, kw_only=True, eq=False)
class Import:
    """One request's hand-off. Ordinals count the prompt's pages from 0; those below `held_pages` are never pulled."""

    request: Request
    peer_index: int = -1
    num_tokens: int = 0  # tokens whose KV the peer hands over
    num_pages: int = 0
    tries_of_peer: int = 0
    streams_opened: int = 0  # decode's part of the attempt number
    generation: int = 0  # pulls of an earlier generation are none of this attempt's
    stream_id: int = 0
    is_open: bool = False
    queued: bool = False  # has been in the receive queue in this attempt
    held_pages: int = 0
    accepted: Accepted | None = None
    endpoints: tuple[RankEndpoint, ...] = ()  # of the chosen transport, by exporting rank
    checksums: list[bytearray] = field(default_factory=list)  # by piece, from ordinal held_pages on
    remote_pages: bytearray = field(default_factory=bytearray)
    pending: set[int] = field(default_factory=set)
    landed: set[int] = field(default_factory=set)
    retried: set[int] = field(default_factory=set)

    @property
    def peer(self) -> PrefillPeer:
        return self.request.peers[self.peer_index]

    @property
    def num_open_outputs(self) -> int:
        """Outputs that the hand-off's first Open carried."""
        return self.num_tokens - self.request.num_prompt

    @property
    def pins(self) -> bool:
        """Whether it holds a prefix that may be taken back."""
        return self.held_pages > 0 and self.request.state is State.AWAITING

    @property
    def num_announced(self) -> int:
        """Pages held or announced, from ordinal 0."""
        return self.held_pages + (len(self.checksums[0]) // _CHECKSUM_BYTES if self.checksums else 0)

    @property
    def is_landed(self) -> bool:
        return len(self.landed) == self.num_pages - self.held_pages

    def turn_to(self, peer_index: int, page_tokens: int) -> None:
        """Begin with another peer. Only the first peer's first attempt may hold a prefix."""
        self.peer_index = peer_index
        self.tries_of_peer = 0
        self.num_tokens = self.request.num_prompt + self.peer.output_tokens
        self.num_pages = -(-self.num_tokens // page_tokens)

    def reset(self) -> None:
        """Forget everything about the present stream."""
        self.queued = False
        self.held_pages = 0
        self.accepted = None
        self.endpoints = ()
        self.checksums.clear()
        self.remote_pages.clear()
        self.pending.clear()
        self.landed.clear()
        self.retried.clear()

    def accept(self, accepted: Accepted, transports: tuple[str, ...], settings: SchedulerSettings) -> bool:
        """Take the peer's answer in; False if this worker cannot read from it."""
        whole = (accepted.sharding, settings.sharding, settings.num_layers, settings.num_kv_heads)
        if self.accepted is not None or pair_fault(*whole):
            return False
        self.accepted = accepted
        self.endpoints = choose_endpoints(accepted.endpoints, transports, accepted.sharding)
        self.checksums = [bytearray() for _ in pieces(*whole)]
        return bool(self.endpoints) and accepted.checksum == settings.checksum

    def note_announce(self, announce: Announce) -> bool:
        """Take an announcement in; False if it does not continue the last one or does not add up."""
        if self.accepted is None or len(announce.ranks) != len(self.checksums):
            return False
        first = announce.ranks[0]
        count = len(first.checksums) // _CHECKSUM_BYTES
        if count == 0 or any(len(piece.checksums) != count * _CHECKSUM_BYTES for piece in announce.ranks):
            return False
        if first.page_numbers and len(first.page_numbers) != count * _PAGE_NUMBER_BYTES:
            return False
        if announce.first_ordinal != self.num_announced or self.num_announced + count > self.num_pages:
            return False
        for known, piece in zip(self.checksums, announce.ranks, strict=True):
            known += piece.checksums
        self.remote_pages += first.page_numbers
        return True

    def wanted(self) -> list[int]:
        """Return announced ordinals that are neither here nor on their way."""
        return [
            ordinal
            for ordinal in range(self.held_pages, self.num_announced)
            if ordinal not in self.landed and ordinal not in self.pending
        ]

    def checksums_of(self, ordinals: tuple[int, ...]) -> bytes:
        """Return those of all pieces, piece by piece."""
        return b"".join(_pick(piece, ordinals, self.held_pages, _CHECKSUM_BYTES) for piece in self.checksums)

    def remote_pages_of(self, ordinals: tuple[int, ...]) -> bytes:
        return _pick(self.remote_pages, ordinals, self.held_pages, _PAGE_NUMBER_BYTES) if self.remote_pages else b""


def _pick(packed: bytearray, ordinals: tuple[int, ...], first: int, size: int) -> bytes:
    return b"".join(bytes(packed[(ordinal - first) * size : (ordinal - first + 1) * size]) for ordinal in ordinals)


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One pull under way. It outlives its attempt and its request: its pages are not free until it has ended."""

    owner: Import
    generation: int
    ordinals: tuple[int, ...]
    pages: tuple[int, ...]

    @property
    def is_current(self) -> bool:
        return self.generation == self.owner.generation


class ImportBook:
    """All imports, by request and by stream; all tickets."""

    def __init__(self) -> None:
        self.tickets: dict[int, Ticket] = {}
        self.receive_queue: list[Import] = []
        self._by_request: dict[int, Import] = {}
        self._by_stream: dict[int, Import] = {}
        self._num_streams = 0
        self._num_tickets = 0

    def add(self, request: Request) -> Import:
        imp = Import(request=request)
        self._by_request[request.request_id] = imp
        return imp

    def live(self) -> list[Import]:
        return list(self._by_request.values())

    def of(self, request: Request) -> Import | None:
        return self._by_request.get(request.request_id)

    def by_stream(self, stream_id: int) -> Import | None:
        return self._by_stream.get(stream_id)

    def new_stream(self, imp: Import) -> int:
        self._num_streams += 1
        imp.stream_id = self._num_streams
        imp.is_open = True
        imp.streams_opened += 1
        imp.tries_of_peer += 1
        self._by_stream[imp.stream_id] = imp
        return imp.stream_id

    def forget_stream(self, imp: Import) -> None:
        imp.is_open = False
        self._by_stream.pop(imp.stream_id, None)

    def new_ticket(self, imp: Import, ordinals: tuple[int, ...], pages: tuple[int, ...]) -> int:
        self._num_tickets += 1
        imp.pending.update(ordinals)
        self.tickets[self._num_tickets] = Ticket(imp, imp.generation, ordinals, pages)
        return self._num_tickets

    def take_tickets(self) -> list[Ticket]:
        tickets = list(self.tickets.values())
        self.tickets.clear()
        return tickets

    def unqueue(self, imp: Import) -> None:
        if imp in self.receive_queue:
            self.receive_queue.remove(imp)

    def remove(self, imp: Import) -> None:
        """The import is over; its tickets stay until their reads are."""
        imp.generation += 1
        self.unqueue(imp)
        self.forget_stream(imp)
        self._by_request.pop(imp.request.request_id, None)

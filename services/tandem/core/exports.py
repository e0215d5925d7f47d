"""The records of hand-offs on prefill: who pulls, what is announced, who pins how much. Bookkeeping only."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from tandem.core.messages.handoff import FirstToken, Open, RankPages
from tandem.core.request import Request

CHECKSUM_BYTES = 8
_MAX_ENDED = 1 << 16


def rank_pages(checksums: bytes, num_pieces: int, page_numbers: bytes) -> tuple[RankPages, ...]:
    """Return what is announced of each piece; a page has the same number in every rank's pool, so it is said once."""
    size = len(checksums) // num_pieces
    parts = (checksums[begin : begin + size] for begin in range(0, len(checksums), size))
    return tuple(RankPages(part, b"" if index else page_numbers) for index, part in enumerate(parts))


@dataclass(slots=True, kw_only=True, eq=False)
class Export:
    """One hand-off. It outlives its request and, for the lease, its stream.

    `pages` are pinned from ordinal 0 once the request has its pages; below `held_pages` they are never announced in
    the present attempt. computed >= exported >= announced, as numbers of leading pages.
    """

    open: Open  # of the present attempt; tokens and output count are those of the first
    open_length: int  # tokens that it carried
    request: Request
    total_pages: int
    held_pages: int
    token: bytes
    stream_id: int | None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    exported: int = 0
    announced: int = 0
    in_transfer: bool = False  # the transfer process knows pages of this hand-off
    accepted_sent: bool = False
    first_token: FirstToken | None = None
    first_token_sent: bool = False
    lease_until: float | None = None

    @property
    def handoff_id(self) -> bytes:
        return self.open.handoff_id

    @property
    def importer(self) -> bytes:
        return self.open.importer_instance_id

    @property
    def is_leased(self) -> bool:
        return self.stream_id is None

    def begin_attempt(self, open_: Open, token: bytes, stream_id: int, page_tokens: int) -> None:
        """Announce everything from the new attempt's own tokens_held on."""
        self.open = open_
        self.token = token
        self.stream_id = stream_id
        self.held_pages = open_.tokens_held // page_tokens
        self.lease_until = None
        self.forget_announcements()

    def forget_announcements(self) -> None:
        self.exported = self.announced = self.held_pages
        self.accepted_sent = False
        self.first_token_sent = False


class ExportBook:
    """All hand-offs, by id and by stream; those being revoked; ids that have ended; pins by importer."""

    def __init__(self, remember_seconds: float) -> None:
        self.live: dict[bytes, Export] = {}
        self.revoking: dict[bytes, Export] = {}
        self._by_stream: dict[int, Export] = {}
        self._by_request: dict[int, Export] = {}
        self._ended: OrderedDict[bytes, float] = OrderedDict()
        self._remember_seconds = remember_seconds
        self._pinned: dict[bytes, int] = {}

    def add(self, export: Export) -> None:
        self.live[export.handoff_id] = export
        self._by_request[export.request.request_id] = export
        self.bind(export)

    def bind(self, export: Export) -> None:
        assert export.stream_id is not None
        self._by_stream[export.stream_id] = export

    def unbind(self, export: Export) -> None:
        if export.stream_id is not None:
            self._by_stream.pop(export.stream_id, None)
            export.stream_id = None

    def by_stream(self, stream_id: int) -> Export | None:
        return self._by_stream.get(stream_id)

    def of(self, request: Request) -> Export:
        return self._by_request[request.request_id]

    def leased(self) -> list[Export]:
        """Hand-offs without a stream that pin pages, longest without first."""
        found = [export for export in self.live.values() if export.is_leased and export.pages]
        return sorted(found, key=lambda export: export.lease_until or 0.0)

    # ---- pins -----------------------------------------------------------------------------------------------------

    def pinned(self, importer: bytes) -> int:
        return self._pinned.get(importer, 0)

    def pin(self, importer: bytes, pages: int) -> None:
        self._pinned[importer] = self._pinned.get(importer, 0) + pages

    def unpin(self, importer: bytes, pages: int) -> None:
        left = self._pinned[importer] - pages
        assert left >= 0
        if left:
            self._pinned[importer] = left
        else:
            del self._pinned[importer]

    # ---- ends -----------------------------------------------------------------------------------------------------

    def remove(self, export: Export, now: float) -> None:
        """The hand-off has ended; its id is remembered for a while, so that a late attempt is refused."""
        self.unbind(export)
        del self.live[export.handoff_id]
        del self._by_request[export.request.request_id]
        self._ended[export.handoff_id] = now + self._remember_seconds
        self._ended.move_to_end(export.handoff_id)
        while self._ended and (len(self._ended) > _MAX_ENDED or next(iter(self._ended.values())) <= now):
            self._ended.popitem(last=False)

    def has_ended(self, handoff_id: bytes, now: float) -> bool:
        return handoff_id in self.revoking or self._ended.get(handoff_id, 0.0) > now

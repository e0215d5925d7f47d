"""Pulls pages over TCP: one link a peer, pulls cut into parts that the link's connections share."""

from __future__ import annotations

import threading

from tandem.core.messages.transfer import PullEnded, PullStatus, RankPull
from tandem.core.sharding import MAX_PIECES_OF_RANK
from tandem.transfer.choice import TCP
from tandem.transfer.contract import PullDone
from tandem.transfer.pages import PageSpace
from tandem.transfer.pull_job import Part, PullJob
from tandem.transfer.tcp_link import TcpLink
from tandem.transfer.tcp_stream import TcpSettings
from tandem.transfer.wire import MAX_ID_BYTES, MAX_ORDINALS

MAX_PEERS = 256
_PART_BYTES_MAX = 64 << 20
_PART_BYTES_MIN = 1 << 20  # less is not worth a second connection
_CLOSE_SECONDS = 5.0


class TcpImporter:
    """Reads into `space`. At most MAX_PEERS peers at once; a pull from one more fails."""

    def __init__(self, space: PageSpace, settings: TcpSettings) -> None:
        self._space = space
        self._settings = settings
        self._lock = threading.Lock()
        self._links: dict[tuple[str, bytes], TcpLink] = {}
        self._jobs: dict[int, tuple[PullJob, TcpLink]] = {}

    def pull(self, pull: RankPull, done: PullDone) -> None:
        job = PullJob(pull, self._space, TCP, lambda ended: self._ended(ended, done))
        parts = self._cut(job)
        job.hold(len(parts))
        if fault := _fault(pull):
            job.break_off(PullStatus.FAILED, fault)
            job.let_go(len(parts))
            return
        with self._lock:
            key = (pull.endpoint.address, pull.endpoint.instance_id)
            link = self._links.get(key)
            if link is None and len(self._links) < MAX_PEERS:
                link = self._links[key] = TcpLink(pull.endpoint, self._settings, self._forget)
            if link is not None:
                self._jobs[pull.ticket] = (job, link)
                link.submit(parts)
                return
        job.break_off(PullStatus.FAILED, f"already connected to {MAX_PEERS} peers")
        job.let_go(len(parts))

    def cancel(self, ticket: int) -> None:
        with self._lock:
            job, link = self._jobs.get(ticket, (None, None))
        if job is not None and link is not None:
            link.break_off(job, PullStatus.CANCELLED, "cancelled")

    def close(self) -> None:
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close(_CLOSE_SECONDS)

    def _cut(self, job: PullJob) -> list[Part]:
        """Share the pages between the connections, in parts that are neither tiny nor long."""
        num_pages, page_bytes = len(job.ordinals), job.pages.bytes_each
        fair = -(-num_pages // self._settings.connections)
        low, high = -(-_PART_BYTES_MIN // page_bytes), max(1, min(_PART_BYTES_MAX // page_bytes, MAX_ORDINALS))
        step = min(max(fair, low), high)
        return [Part(job, begin, min(begin + step, num_pages)) for begin in range(0, num_pages, step)]

    def _ended(self, ended: PullEnded, done: PullDone) -> None:
        with self._lock:
            self._jobs.pop(ended.ticket, None)
        done(ended)

    def _forget(self, link: TcpLink) -> None:
        """Drop a link whose threads have ended, unless work came meanwhile."""
        with self._lock:
            key = (link.endpoint.address, link.endpoint.instance_id)
            if link.is_idle and self._links.get(key) is link:
                del self._links[key]


def _fault(pull: RankPull) -> str:
    """Return what a request could not carry: the exporter chose the token and its sharding."""
    if max(len(pull.handoff_id), len(pull.token)) > MAX_ID_BYTES:
        return f"the hand-off's id or token is longer than {MAX_ID_BYTES} bytes"
    return "" if pull.piece < MAX_PIECES_OF_RANK else f"piece {pull.piece}, {MAX_PIECES_OF_RANK} are the most"

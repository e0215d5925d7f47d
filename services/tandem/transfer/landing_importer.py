"""Pulls pages over a one-sided transport: a landing link a peer, and a watch over pulls that stand still."""

from __future__ import annotations

import threading
import time

import numpy as np

from tandem.core.messages.transfer import PullEnded, PullStatus, RankPull, Source
from tandem.errors import TransportError
from tandem.transfer.contract import PullDone
from tandem.transfer.engine_pool import EnginePool
from tandem.transfer.landing_link import LandingLink
from tandem.transfer.landing_ring import Remote
from tandem.transfer.one_sided import OneSidedAddress
from tandem.transfer.pages import PageSpace, check_slab
from tandem.transfer.pull_job import PullJob
from tandem.transfer.tcp_stream import TcpSettings

MAX_LINKS = 64  # each has an engine
_WATCHES_OF_TIMEOUT = 8
_CLOSE_SECONDS = 5.0
_NUMBER_BYTES = 4


class LandingImporter:
    """Reads into `space` through slots of its own. At most MAX_LINKS engines at once; a pull that needs more fails."""

    def __init__(self, space: PageSpace, transport: str, engines: EnginePool, settings: TcpSettings) -> None:
        self._space = space
        self._transport = transport
        self._engines = engines
        self._settings = settings
        self._changed = threading.Condition()
        self._links: dict[tuple[str, bytes], LandingLink] = {}
        self._all_links: set[LandingLink] = set()  # with those that drain
        self._jobs: dict[int, tuple[PullJob, LandingLink]] = {}
        self._is_closed = False
        self._watcher = threading.Thread(target=self._watch, name="kv-watch", daemon=True)
        self._watcher.start()

    def pull(self, pull: RankPull, done: PullDone) -> None:
        job = PullJob(pull, self._space, self._transport, lambda ended: self._ended(ended, done))
        job.hold()
        try:
            self._assign(job, self._remote(job))
        except TransportError as error:
            job.break_off(PullStatus.FAILED, error.message)
            job.let_go()

    def cancel(self, ticket: int) -> None:
        with self._changed:
            job, link = self._jobs.get(ticket, (None, None))
        if job is not None and link is not None:
            link.break_off(job, PullStatus.CANCELLED, "cancelled")

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            links = list(self._all_links)
            self._changed.notify()
        for link in links:
            link.close(_CLOSE_SECONDS)
        self._watcher.join(_CLOSE_SECONDS)

    def _remote(self, job: PullJob) -> Remote:
        pull = job.pull
        address = OneSidedAddress.decode(pull.endpoint.address)
        if len(pull.remote_pages) != len(pull.pages) * _NUMBER_BYTES:
            raise TransportError("the exporter announced no page numbers")
        numbers = np.frombuffer(pull.remote_pages, dtype="<u4").astype(np.uint64)
        source = pull.source or Source(self._space.page_bytes, self._space.whole)
        check_slab(source.slab, source.page_bytes)
        assert source.slab.num_bytes == job.pages.bytes_each, "both ends cut the same piece"
        return Remote(numbers, source, address.pool)

    def _assign(self, job: PullJob, remote: Remote) -> None:
        """Give a pull to its peer's link, a new one if the present one drains. Raises TransportError."""
        endpoint = job.pull.endpoint
        key = (endpoint.address, endpoint.instance_id)
        with self._changed:
            link = self._links.get(key)
            if link is not None:
                self._jobs[job.pull.ticket] = (job, link)
                if link.pull(job, remote):
                    return
            if len(self._all_links) >= MAX_LINKS or self._is_closed:
                self._jobs.pop(job.pull.ticket, None)
                raise TransportError(f"already {len(self._all_links)} engines")
            link = LandingLink(endpoint, self._engines, self._settings, self._forget)
            self._links[key] = link
            self._all_links.add(link)
            self._jobs[job.pull.ticket] = (job, link)
            link.pull(job, remote)
            link.start()
            self._changed.notify()

    def _ended(self, ended: PullEnded, done: PullDone) -> None:
        with self._changed:
            self._jobs.pop(ended.ticket, None)
        done(ended)

    def _forget(self, link: LandingLink) -> None:
        with self._changed:
            self._all_links.discard(link)
            key = (link.endpoint.address, link.endpoint.instance_id)
            if self._links.get(key) is link:
                del self._links[key]

    def _watch(self) -> None:
        """Break off what stands still, also while an engine blocks its thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if self._is_closed:
                    return
                self._changed.wait_for(lambda: self._is_closed, self._settings.progress_seconds / _WATCHES_OF_TIMEOUT)
                links = list(self._all_links)
            now = time.monotonic()
            for link in links:
                link.expire(now)

"""A transport inside one process: same contract, no sockets. Its importer copies page by page in a thread a pull."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullStatus, RankPull, Slab
from tandem.transfer.contract import PullDone
from tandem.transfer.pages import Pages, PageSpace
from tandem.transfer.pull_job import PullJob

LOOPBACK = "loopback"
_addresses = itertools.count(1)
_exporters: dict[str, LoopbackExporter] = {}


@dataclass
class _Grant:
    attempt: int
    token: bytes
    pieces: tuple[Slab, ...]
    pages: dict[int, tuple[PageSpace, int]] = field(default_factory=dict)


class LoopbackExporter:
    """Reads happen under its lock, so nothing reads when `revoke` has it."""

    def __init__(self, instance_id: bytes) -> None:
        self.lock = threading.Lock()
        self.grants: dict[bytes, _Grant] = {}
        address = f"loopback-{next(_addresses)}"
        self.endpoint = RankEndpoint(transport=LOOPBACK, address=address, instance_id=instance_id)
        _exporters[address] = self

    def open(self, handoff_id: bytes, attempt: int, token: bytes, pieces: Sequence[Slab]) -> None:
        with self.lock:
            known = self.grants.get(handoff_id)
            if known is None or known.attempt < attempt:
                self.grants[handoff_id] = _Grant(attempt, token, tuple(pieces))

    def add(self, handoff_id: bytes, attempt: int, first_ordinal: int, pages: Pages) -> None:
        with self.lock:
            grant = self.grants.get(handoff_id)
            if grant is not None and grant.attempt == attempt:
                for ordinal, number in enumerate(pages.numbers.tolist(), first_ordinal):
                    grant.pages[ordinal] = (pages.space, number)

    def revoke(self, handoff_id: bytes, done: Callable[[], None]) -> None:
        with self.lock:
            self.grants.pop(handoff_id, None)
        done()

    def close(self) -> None:
        _exporters.pop(self.endpoint.address, None)


class LoopbackImporter:
    def __init__(self, space: PageSpace) -> None:
        self._space = space
        self._jobs: dict[int, PullJob] = {}
        self._threads: list[threading.Thread] = []

    def pull(self, pull: RankPull, done: PullDone) -> None:
        job = PullJob(pull, self._space, LOOPBACK, done)
        job.hold()
        self._jobs[pull.ticket] = job
        thread = threading.Thread(target=self._run, args=(job,))
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def cancel(self, ticket: int) -> None:
        if ticket in self._jobs:
            self._jobs[ticket].break_off(PullStatus.CANCELLED, "cancelled")

    def close(self) -> None:
        for job in list(self._jobs.values()):
            job.break_off(PullStatus.FAILED, "the transfer process ends")
        for thread in self._threads:
            thread.join()

    def _run(self, job: PullJob) -> None:
        job.note_read()
        for position in range(len(job.ordinals)):
            if job.is_broken_off or not self._copy(job, position):
                break
        del self._jobs[job.pull.ticket]
        job.let_go()

    def _copy(self, job: PullJob, position: int) -> bool:
        exporter = _exporters.get(job.pull.endpoint.address)
        if exporter is None or exporter.endpoint.instance_id != job.pull.endpoint.instance_id:
            job.break_off(PullStatus.FAILED, "the peer is gone")
            return False
        with exporter.lock:
            grant = exporter.grants.get(job.pull.handoff_id)
            is_known = grant is not None and (grant.attempt, grant.token) == (job.pull.attempt, job.pull.token)
            found = grant.pages.get(int(job.ordinals[position])) if grant is not None and is_known else None
            if found is None:
                job.break_off(PullStatus.REFUSED, "not announced")
                return False
            assert grant is not None
            if job.pull.piece >= len(grant.pieces):
                job.break_off(PullStatus.REFUSED, "no such piece")
                return False
            space, number = found
            source = Pages.of(space, [number], grant.pieces[job.pull.piece])
            _write(job.pages.part(position, position + 1), _read(source))
        job.verify(position, position + 1)
        return True


def _read(pages: Pages) -> bytes:
    return b"".join(pages.space.rows[page][run].tobytes() for page in pages.numbers for run in _runs(pages.slab))


def _write(pages: Pages, data: bytes) -> None:
    stream = np.frombuffer(data, dtype=np.uint8)
    for page in pages.numbers:
        for run in _runs(pages.slab):
            size = run.stop - run.start
            pages.space.rows[page][run], stream = stream[:size], stream[size:]


def _runs(slab: Slab) -> list[slice]:
    begins = range(slab.offset, slab.offset + slab.num_runs * slab.stride, slab.stride)
    return [slice(begin, begin + slab.run_bytes) for begin in begins]

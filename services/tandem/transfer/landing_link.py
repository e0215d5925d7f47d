"""All pulls from one peer over a one-sided engine: one thread, one engine, one landing ring.

Only this thread copies from the ring into pages, and under a lock. So a pull can be ended at any moment, whatever its
reads do. After a failure the link takes no new pulls; what it has finishes or fails, then the engine is parked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullStatus
from tandem.errors import TransportError
from tandem.transfer.engine_pool import EnginePool, Landing
from tandem.transfer.handshake import dial
from tandem.transfer.iovec import Runs
from tandem.transfer.landing_ring import Batch, LandingRing, Remote
from tandem.transfer.one_sided import PROBE_BYTES, OneSidedAddress, ReadEngine, ReadState, probe_pattern
from tandem.transfer.pull_job import PullJob
from tandem.transfer.tcp_stream import TcpSettings

MAX_OUTSTANDING_READS = 1024  # Mooncake's queue for one peer; more can wedge it for good
_POLL_SECONDS_MIN = 0.0002
_POLL_SECONDS_MAX = 0.001
_ENGINE_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class _Entry:
    """A pull and how far it is. `missing[i]`: bytes of its page i that have not landed."""

    job: PullJob
    remote: Remote
    local: Runs
    missing: npt.NDArray[np.int64]
    moved_at: float
    submitted: int = 0  # bytes of its stream that were asked for

    def land(self, batch: Batch) -> None:
        """Move a finished batch into the pages and verify those that are complete now."""
        batch.scatter(self.local)
        size = self.remote.bytes_each
        touched = np.arange(batch.begin // size, -(-batch.end // size))
        landed = np.minimum(batch.end, (touched + 1) * size) - np.maximum(batch.begin, touched * size)
        self.missing[touched] -= landed
        whole = touched[self.missing[touched] == 0]
        if len(whole):
            self.job.verify(int(whole[0]), int(whole[-1]) + 1)


class LandingLink:
    """`pull`, `break_off` and `expire` from any thread. `ended` is called once the engine is given back."""

    def __init__(
        self,
        endpoint: RankEndpoint,
        engines: EnginePool,
        settings: TcpSettings,
        ended: Callable[[LandingLink], None],
    ) -> None:
        self.endpoint = endpoint
        self._engines = engines
        self._settings = settings
        self._ended = ended
        self._changed = threading.Condition()  # also held while pages are written
        self._entries: dict[PullJob, _Entry] = {}
        self._waiting: deque[_Entry] = deque()
        self._batches: dict[int, Batch] = {}  # by read id; the thread's own
        self._is_draining = False
        self._has_failed = False
        self._moved_at = time.monotonic()
        self._limit_seconds = settings.progress_seconds
        self._thread = threading.Thread(target=self._run, name="kv-land", daemon=True)

    def start(self) -> None:
        """Begin; pulls that came before wait for it."""
        self._thread.start()

    def pull(self, job: PullJob, remote: Remote) -> bool:
        """Take a pull over, which holds its job once; False if this link takes no more."""
        missing = np.full(len(job.ordinals), remote.bytes_each, dtype=np.int64)
        with self._changed:
            if self._is_draining:
                return False
            entry = self._entries[job] = _Entry(job, remote, Runs.of(job.pages), missing, time.monotonic())
            self._waiting.append(entry)
            self._changed.notify()
        return True

    def break_off(self, job: PullJob, status: PullStatus, message: str) -> None:
        """End a pull now: its reads may go on, but only into the ring."""
        job.break_off(status, message)
        self._end(job)

    def expire(self, now: float) -> None:
        """Break off what has made no progress; from then on the engine is not trusted with new pulls."""
        with self._changed:
            limit = self._limit_seconds
            stale = [
                entry.job
                for entry in self._entries.values()
                if now - (entry.moved_at if entry.submitted else max(entry.moved_at, self._moved_at)) > limit
            ]
            self._has_failed |= bool(stale)
            self._is_draining |= bool(stale)
        for job in stale:
            self.break_off(job, PullStatus.FAILED, f"no progress for {limit:g} s")

    def close(self, join_seconds: float) -> None:
        self._fail_all("the transfer process ends")
        self._thread.join(join_seconds)

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            address = OneSidedAddress.decode(self.endpoint.address)
            # A silent port blocks an engine for a minute: first let the very process prove that it is there.
            dial(address.control, self.endpoint.instance_id, self._settings).close()
            landing = self._take_engine()
            try:
                self._probe(landing, address)
                self._pump(landing.engine, landing.ring, address)
            except TransportError:
                self._has_failed = True
                raise
            finally:
                self._engines.give_back(landing, self._has_failed)
        except (OSError, TransportError) as error:
            self._fail_all(f"{self.endpoint.address}: {error}")
        finally:
            self._ended(self)

    def _take_engine(self) -> Landing:
        """Starting one is slow (RDMA devices are looked for) but no fault of the peer: other limits hold meanwhile."""
        self._note_progress(_ENGINE_SECONDS)
        landing = self._engines.take()
        self._note_progress(self._settings.progress_seconds)
        return landing

    def _note_progress(self, limit_seconds: float) -> None:
        with self._changed:
            self._moved_at = time.monotonic()
            self._limit_seconds = limit_seconds

    def _probe(self, landing: Landing, address: OneSidedAddress) -> None:
        """Read the exporter's pattern through the real path; raises TransportError if it is not what it must be."""
        engine, ring = landing.engine, landing.ring
        slot = ring.take()
        assert slot is not None
        read = engine.submit(address.session, slot, address.probe, PROBE_BYTES)
        deadline = time.monotonic() + self._settings.progress_seconds
        state = ReadState.FAILED if read is None else ReadState.RUNNING
        while read is not None and state is ReadState.RUNNING and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS_MIN)
            state = engine.poll(read)
        begin = slot - ring.address
        if state is not ReadState.DONE:
            raise TransportError(f"the probe read is {state.value}")
        if ring.memory[begin : begin + PROBE_BYTES].tobytes() != probe_pattern(self.endpoint.instance_id):
            raise TransportError("the probe shows other bytes: another process, or a broken path")
        ring.give_back(slot)
        self._note_progress(self._settings.progress_seconds)

    def _pump(self, engine: ReadEngine, ring: LandingRing, address: OneSidedAddress) -> None:
        pause = _POLL_SECONDS_MIN
        while self._wait_for_work():
            has_moved = False
            while (prepared := self._prepare(ring)) is not None:
                self._submit(engine, ring, address.session, *prepared)
                has_moved = True
            for read, batch in list(self._batches.items()):
                state = engine.poll(read)
                if state is ReadState.RUNNING:
                    continue
                has_moved = True
                del self._batches[read]
                batch.reads.discard(read)
                batch.has_failed |= state is ReadState.FAILED
                if not batch.reads:
                    self._finish(batch, ring)
            pause = _POLL_SECONDS_MIN if has_moved else min(2 * pause, _POLL_SECONDS_MAX)
            if has_moved:
                self._moved_at = time.monotonic()
            else:
                time.sleep(pause)

    def _wait_for_work(self) -> bool:
        """False: the engine is to be given back. Deciding that and taking no more pulls are one step."""
        with self._changed:
            if not self._entries and not self._batches and not self._is_draining:
                self._changed.wait_for(lambda: self._entries or self._is_draining, self._settings.idle_seconds)
            if self._entries:
                return True
            is_lost = time.monotonic() - self._moved_at > self._settings.progress_seconds
            if self._batches and not self._is_draining and not is_lost:
                return True  # reads of broken-off pulls: their slots come back
            self._is_draining = True
            return False

    def _prepare(self, ring: LandingRing) -> tuple[Batch, list[tuple[int, int]]] | None:
        """Choose the next reads: the oldest pull's next bytes, as many as a slot and the engine's queue take."""
        with self._changed:
            while self._waiting and self._waiting[0].job not in self._entries:
                self._waiting.popleft()
            room = MAX_OUTSTANDING_READS - len(self._batches)
            if not self._waiting or (slot := ring.take()) is None:
                return None
            entry = self._waiting[0]
            begin, total = entry.submitted, entry.remote.num_bytes
            pieces = entry.remote.reads(begin, min(begin + ring.slot_bytes, total))[:MAX_OUTSTANDING_READS]
            if len(pieces) > room:
                ring.give_back(slot)
                return None
            entry.submitted += sum(length for _, length in pieces)
            if begin == 0:
                entry.moved_at = time.monotonic()
            if entry.submitted == total:
                self._waiting.popleft()
            return Batch(entry.job, entry.remote, slot, begin, entry.submitted), pieces

    def _submit(
        self, engine: ReadEngine, ring: LandingRing, session: str, batch: Batch, pieces: list[tuple[int, int]]
    ) -> None:
        batch.job.note_read()
        local = batch.slot
        for remote, length in pieces:
            read = engine.submit(session, local, remote, length)
            if read is None:
                batch.has_failed = True
                break
            batch.reads.add(read)
            self._batches[read] = batch
            local += length
        if not batch.reads:
            self._finish(batch, ring)

    def _finish(self, batch: Batch, ring: LandingRing) -> None:
        """Land a batch whose reads are over. The slot of a failed one is never used again."""
        if batch.has_failed:
            with self._changed:
                self._has_failed = self._is_draining = True
            self.break_off(batch.job, PullStatus.FAILED, f"{self.endpoint.address}: a read failed")
            return
        is_complete = False
        with self._changed:
            entry = self._entries.get(batch.job)
            if entry is not None:
                entry.land(batch)
                entry.moved_at = time.monotonic()
                is_complete = not entry.missing.any()
        ring.give_back(batch.slot)
        if is_complete:
            self._end(batch.job)

    def _end(self, job: PullJob) -> None:
        with self._changed:
            if self._entries.pop(job, None) is None:
                return
        job.let_go()

    def _fail_all(self, message: str) -> None:
        with self._changed:
            self._is_draining = True
            jobs = list(self._entries)
            self._changed.notify()
        for job in jobs:
            self.break_off(job, PullStatus.FAILED, message)

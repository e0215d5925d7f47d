"""The connections to one exporting process: a few threads with a connection each, and the parts that wait for them.

A stuck or dead peer holds these threads only. A part has its connection to itself while it is read, so breaking a
pull off (cutting its connections) disturbs no other.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullStatus
from tandem.errors import TransportError
from tandem.transfer import wire
from tandem.transfer.frames import FramePlan
from tandem.transfer.handshake import dial
from tandem.transfer.pull_job import Part, PullJob
from tandem.transfer.tcp_stream import PeerStuck, Stream, TcpSettings
from tandem.transfer.wire import Frame, ProtocolError, Request, Status

_STILL_MOVING = 0.75  # of the time-out: a connection that has moved within that is alive


class Refused(TransportError):
    """The exporter does not serve what was asked for; the connection is as good as before."""


class TcpLink:
    """Threads start with the work and end when idle. Calls return at once and come from any thread."""

    def __init__(self, endpoint: RankEndpoint, settings: TcpSettings, idle: Callable[[TcpLink], None]) -> None:
        self.endpoint = endpoint
        self._settings = settings
        self._idle = idle  # called, without a lock, by a thread that ends last
        self._changed = threading.Condition()
        self._queue: deque[Part] = deque()
        self._active: dict[Part, Stream] = {}
        self._threads: set[threading.Thread] = set()
        self._num_connected = 0
        self._num_waiting = 0
        self._sequence = itertools.count(1)
        self._is_closed = False

    @property
    def is_idle(self) -> bool:
        """Whether no thread is left."""
        with self._changed:
            return not self._threads

    def submit(self, parts: list[Part]) -> None:
        """Read them, in order as far as connections are free. Each part holds its job already."""
        with self._changed:
            self._queue.extend(parts)
            missing = min(len(self._queue) - self._num_waiting, self._settings.connections - len(self._threads))
            for _ in range(missing):
                thread = threading.Thread(target=self._run, name="kv-pull", daemon=True)
                self._threads.add(thread)
                thread.start()
            self._changed.notify_all()  # a thread that is busy connecting may not be the one to wait for

    def break_off(self, job: PullJob, status: PullStatus, message: str) -> None:
        """Drop the job's waiting parts and cut its connections; it ends when their threads have noticed."""
        with self._changed:
            job.break_off(status, message)
            waiting = [part for part in self._queue if part.job is job]
            for part in waiting:
                self._queue.remove(part)
            for part, stream in self._active.items():
                if part.job is job:
                    stream.shut()
        if waiting:
            job.let_go(len(waiting))

    def close(self, join_seconds: float) -> None:
        with self._changed:
            self._is_closed = True
            for part, stream in self._active.items():
                part.job.break_off(PullStatus.FAILED, "the transfer process ends")
                stream.shut()
            threads = list(self._threads)
            self._changed.notify_all()
        self._fail_queued("the transfer process ends")
        for thread in threads:
            thread.join(join_seconds)

    # ---- a thread and its connection ------------------------------------------------------------------------------

    def _run(self) -> None:
        stream: Stream | None = None
        is_fresh = True
        while self._wait_for_work():
            if stream is None:
                is_fresh = True
                stream = self._connect()
                if stream is None:
                    if self._leave_to_others():
                        break
                    continue
            if (part := self._take(stream)) is not None and not self._finish(part, stream, is_fresh):
                self._disconnect(stream)
                stream = None
            is_fresh = False
        if stream is not None:
            self._disconnect(stream)
        if self.is_idle:
            self._idle(self)

    def _wait_for_work(self) -> bool:
        """False: this thread is no longer one of the link's. Leaving and looking at the queue are one step."""
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: self._queue or self._is_closed, self._settings.idle_seconds)
            self._num_waiting -= 1
            if self._queue and not self._is_closed:
                return True
            self._threads.discard(threading.current_thread())
            return False

    def _leave_to_others(self) -> bool:
        """After a failed connect: leave if other threads are connected, else fail all that waits."""
        with self._changed:
            if self._num_connected:
                self._threads.discard(threading.current_thread())
                self._changed.notify()  # what woke this thread up is theirs now
                return True
        return False

    def _connect(self) -> Stream | None:
        """Connect; on failure, and with no other connection there, everything that waits has failed."""
        try:
            stream = dial(self.endpoint.address, self.endpoint.instance_id, self._settings)
        except (OSError, TransportError) as error:
            if not self._num_connected:
                self._fail_queued(f"cannot reach {self.endpoint.address}: {error}")
            return None
        with self._changed:
            self._num_connected += 1
        return stream

    def _disconnect(self, stream: Stream) -> None:
        with self._changed:
            self._num_connected -= 1
        stream.close()

    def _take(self, stream: Stream) -> Part | None:
        with self._changed:
            if not self._queue or self._is_closed:
                return None
            part = self._queue.popleft()
            self._active[part] = stream
            return part

    def _finish(self, part: Part, stream: Stream, is_fresh: bool) -> bool:
        """Read one part and let its job go; False if the connection is no good any more.

        A connection from the pool may have been closed by the exporter: then the part waits for another one.
        """
        failure: tuple[PullStatus, str] | None = None
        is_usable, is_again = True, False
        reading = _PartReader(part, stream, next(self._sequence) & 0xFFFFFFFF)
        try:
            reading.read()
        except Refused as error:
            failure = (PullStatus.REFUSED, error.message)
        except (OSError, TransportError) as error:
            is_usable = False
            is_again = not is_fresh and not reading.has_begun and isinstance(error, OSError)
            failure = (PullStatus.FAILED, f"{self.endpoint.address}: {error}")
            if isinstance(error, PeerStuck):
                self._note_stuck(str(error))
        with self._changed:
            del self._active[part]
            is_usable = is_usable and not part.job.is_broken_off  # else it was cut
            if is_again and not part.job.is_broken_off and not self._is_closed:
                self._queue.appendleft(part)
                return False
        if failure is not None:
            self.break_off(part.job, *failure)
        part.job.let_go()
        return is_usable

    def _note_stuck(self, message: str) -> None:
        """Fail what waits as well, unless another connection moves: it would only wait as long again."""
        # A little less than the time-out: connections that stopped together are not noticed at the same moment.
        since = time.monotonic() - self._settings.progress_seconds * _STILL_MOVING
        with self._changed:
            is_stuck = not any(stream.last_moved > since for stream in self._active.values())
        if is_stuck:
            self._fail_queued(message)

    def _fail_queued(self, message: str) -> None:
        with self._changed:
            jobs: Iterable[PullJob] = {part.job: None for part in self._queue}
        for job in jobs:
            self.break_off(job, PullStatus.FAILED, message)


class _PartReader:
    """Reads one part. `has_begun`: something of the response has arrived."""

    def __init__(self, part: Part, stream: Stream, sequence: int) -> None:
        self._part = part
        self._stream = stream
        self._sequence = sequence
        self._page_bytes = part.job.pages.bytes_each
        self.has_begun = False

    def read(self) -> None:
        """Raises Refused (the connection stays good), TransportError or OSError."""
        job, begin, end = self._part.job, self._part.begin, self._part.end
        pages = job.pages.part(begin, end)
        job.note_read()
        request = Request(
            sequence=self._sequence,
            handoff_id=job.pull.handoff_id,
            attempt=job.pull.attempt,
            token=job.pull.token,
            piece=job.pull.piece,
            piece_bytes=self._page_bytes,
            ordinals=job.ordinals[begin:end],
        )
        plan = FramePlan.receiving(pages)
        self._stream.write(request.encode())
        plan.heads[0] = np.frombuffer(self._stream.read(wire.FRAME_BYTES), dtype=np.uint8)
        self.has_begun = True
        offset, num_verified = 0, 0
        for head, step in zip(plan.heads, plan.steps, strict=True):
            self._check(Frame.decode(head.tobytes()), offset, step.end)
            self._stream.read_memory(step.vectors, step.size)
            offset, num_whole = step.end, step.end // self._page_bytes
            job.verify(begin + num_verified, begin + num_whole)
            num_verified = num_whole
            if job.is_broken_off:
                raise ProtocolError("broken off")

    def _check(self, frame: Frame, begin: int, end: int) -> None:
        """Let only the frame pass that comes next."""
        if frame.sequence != self._sequence:
            raise ProtocolError("a frame answers another request")
        if frame.status is not Status.OK:
            raise Refused(self._stream.read(frame.length).decode(errors="replace") if frame.length else "refused")
        if (frame.offset, frame.length) != (begin, end - begin):
            raise ProtocolError("a frame is not what comes next")

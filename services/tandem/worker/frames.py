"""What waits to be sent on one Session stream: deltas, ends, load and info, merged into frames, bounded.

While the gateway reads, each turn of the rank's loop becomes one frame; a gateway that lags gets what has gathered
meanwhile as one frame.
"""

from __future__ import annotations

import asyncio

from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2

MAX_UNREAD_BYTES = 128 << 20  # roughly; a gateway that leaves more unread is cut off
_FRAME_BYTES_CHECKED = 1 << 20  # ByteSize is not free: it is asked for so often and no more


class Frames:
    """One producer, one consumer, one event loop.

    `overflowed` turns true at the bound and stays so; nothing is kept any more then. The consumer may be stuck in a
    write that the gateway does not take, so it is the producer who has to look at it.
    """

    def __init__(self) -> None:
        self.overflowed = False
        self._pending = worker_pb2.SessionResponse()
        self._ready = asyncio.Event()
        self._closed = False
        self._estimate = 0

    def add_delta(self, delta: worker_pb2.SequenceDelta) -> None:
        """Add output; `send` makes it go."""
        if self.overflowed:
            return
        self._pending.deltas.append(delta)
        self._count(24 + 5 * len(delta.token_ids) + 512 * (len(delta.logprobs) + len(delta.prompt_logprobs)))

    def add_end(self, end: worker_pb2.SequenceEnd) -> None:
        """Add an end; `send` makes it go."""
        if self.overflowed:
            return
        self._pending.ends.append(end)
        self._count(256 + 512 * len(end.prompt_logprobs))

    def send(self, step: int, mono_ns: int) -> None:
        """Let the consumer have what was added."""
        self._pending.step = step
        self._pending.mono_ns = mono_ns
        self._ready.set()

    def set_load(self, load: worker_pb2.LoadSnapshot) -> None:
        """Send this load; one that is still unsent is replaced."""
        self._pending.load.CopyFrom(load)
        self._ready.set()

    def set_info(self, info: worker_pb2.WorkerInfo) -> None:
        """Send this info; one that is still unsent is replaced."""
        self._pending.info.CopyFrom(info)
        self._ready.set()

    def close(self) -> None:
        """Let `next` return None once everything is sent."""
        self._closed = True
        self._ready.set()

    async def next(self) -> worker_pb2.SessionResponse | None:
        """Return the next frame; None after `close` or an overflow."""
        await self._ready.wait()
        if self.overflowed:
            return None
        frame = self._pending
        if self._closed and not frame.ListFields():
            return None
        self._pending = worker_pb2.SessionResponse()
        self._estimate = 0
        if not self._closed:
            self._ready.clear()
        return frame

    def _count(self, estimated_bytes: int) -> None:
        self._estimate += estimated_bytes
        if self._estimate > _FRAME_BYTES_CHECKED:
            self._estimate = 0
            if self._pending.ByteSize() > MAX_UNREAD_BYTES:
                self.overflowed = True
                self._pending.Clear()
                self._ready.set()

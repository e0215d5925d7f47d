"""The frontend's hold on its rank: starts the process, carries the typed pipe in asyncio, learns of its end.

The pipe is bounded in both directions by `tandem.ipc`; a rank that does not read what it is sent counts as dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tandem.ipc import MAX_PENDING_BYTES, FrameReader
from tandem.worker.messages import TO_FRONTEND, TO_RANK

EXIT_SECONDS = 1.0  # between the end of the pipe and the end of the process
STDERR_LINES = 20  # of the rank, kept to say why it died
_STDERR_LINE_BYTES = 1 << 16
_logger = logging.getLogger(__name__)


class RankProcess:
    """One life of rank 0. `exit_code` is done when the process is gone and everything it said has been received."""

    def __init__(self) -> None:
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._deaf = False
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def spawn(cls, receive: Callable[[list[Any]], None], command: Sequence[str] = ()) -> RankProcess:
        """Start the process; `receive` gets its messages in the batches that arrive. `command` is for tests."""
        rank = cls()
        ours, theirs = socket.socketpair()
        # A pipe of our own: asyncio's would make the process look alive for as long as any child of it holds stderr.
        stderr_reader, stderr_writer = os.pipe()
        with theirs, open(stderr_writer, "wb") as stderr_end:
            rank._process = await asyncio.create_subprocess_exec(
                *(command or (sys.executable, "-m", "tandem.worker.rank_main")),
                str(theirs.fileno()),
                str(os.getpid()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=stderr_end,
                start_new_session=True,  # a terminal's Ctrl-C is for the frontend alone
            )
        pipe_closed = asyncio.Event()
        transport, _ = await asyncio.get_running_loop().create_unix_connection(
            lambda: _Pipe(receive, pipe_closed), sock=ours
        )
        transport.set_write_buffer_limits(high=MAX_PENDING_BYTES)
        rank._transport = transport
        stderr = asyncio.create_task(rank._read_stderr(stderr_reader), name="rank stderr")
        rank._tasks = [stderr, asyncio.create_task(rank._wait(stderr, pipe_closed), name="rank exit")]
        return rank

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, message: object) -> None:
        """Queue a message. After the rank's death it is dropped: `exit_code` is the news."""
        if self._transport is None or self._transport.is_closing() or self._deaf:
            return
        self._transport.write(TO_RANK.encode(message))
        if self._transport.get_write_buffer_size() > MAX_PENDING_BYTES:
            _logger.error("rank 0 has not read %d bytes: it is ended", self._transport.get_write_buffer_size())
            self._deaf = True
            self.kill()

    def last_words(self) -> str:
        """The end of what the process wrote on stderr."""
        return "\n".join(self._stderr)

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None and self._process.returncode is None:
                self._process.send_signal(signal.SIGKILL)

    async def close(self) -> None:
        """Kill what still runs and reap it."""
        self.kill()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
        if self._transport is not None:
            self._transport.close()

    async def _read_stderr(self, descriptor: int) -> None:
        """Pass stderr on, line by line, and keep its end."""
        reader = asyncio.StreamReader(limit=_STDERR_LINE_BYTES)
        pipe = open(descriptor, "rb")  # noqa: SIM115  the transport closes it
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while True:
                try:
                    line = await reader.readline()
                except ValueError:
                    continue  # a line beyond the limit has been discarded
                if not line:
                    return
                self._stderr.append(line.decode(errors="replace").rstrip())
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
        finally:
            transport.close()

    async def _wait(self, stderr: asyncio.Task[None], pipe_closed: asyncio.Event) -> None:
        assert self._process is not None
        closed = asyncio.create_task(pipe_closed.wait())
        exited = asyncio.create_task(self._process.wait())
        # A rank whose pipe is broken is of no use even if its process hangs on.
        await asyncio.wait((closed, exited), return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(exited), EXIT_SECONDS)
        self.kill()
        code = await exited
        # The process is gone, so both pipes are at their end; its children may hold stderr open, nothing more.
        await asyncio.wait((stderr, closed), timeout=0.5)
        stderr.cancel()
        closed.cancel()
        if not self.exit_code.done():
            self.exit_code.set_result(code)


class _Pipe(asyncio.Protocol):
    def __init__(self, receive: Callable[[list[Any]], None], closed: asyncio.Event) -> None:
        self._receive = receive
        self._closed = closed
        self._reader = FrameReader(TO_FRONTEND)
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._reader.feed(data)
        except ValueError as error:
            _logger.error("rank 0 sent what is no message: %s", error)
            assert self._transport is not None
            self._transport.close()
            return
        if messages:
            self._receive(messages)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

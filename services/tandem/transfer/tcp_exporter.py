"""Serves announced pages over TCP: a thread a connection, a bounded number of connections, everything with a time-out.

Peers are untrusted until they name a hand-off, its attempt and its token; they never name memory.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import Slab
from tandem.errors import TransportError
from tandem.transfer import wire
from tandem.transfer.choice import TCP
from tandem.transfer.frames import FramePlan
from tandem.transfer.grants import GrantTable
from tandem.transfer.handshake import welcome
from tandem.transfer.pages import Pages
from tandem.transfer.tcp_stream import Stream, TcpSettings, join_address
from tandem.transfer.tls import Untrusted
from tandem.transfer.wire import Frame, Request, RequestHead, Status

_log = logging.getLogger(__name__)

_MAX_FRAME_SECONDS = 60.0  # slower than 70 kB/s is no importer
_IDLE_FACTOR = 2  # the importer closes first, so that it seldom finds a dead connection in its pool
_BACKLOG = 128
_CLOSE_SECONDS = 5.0
_TOLD_SECONDS = 10.0  # a stranger who tries again and again fills no log


class TcpExporter:
    """Listens from the start; nothing is served before `add`."""

    def __init__(self, listener: socket.socket, host: str, instance_id: bytes, settings: TcpSettings) -> None:
        self._listener = listener
        self._settings = settings
        self._instance_id = instance_id
        self._grants = GrantTable()
        self._lock = threading.Lock()
        self._idle_since: dict[Stream, float] = {}  # every connection; inf while it serves
        self._threads: set[threading.Thread] = set()
        self._is_closed = False
        self._told_at = -_TOLD_SECONDS
        address = join_address(host, listener.getsockname()[1])
        self.endpoint = RankEndpoint(transport=TCP, address=address, instance_id=instance_id)
        self._acceptor = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    def open(self, handoff_id: bytes, attempt: int, token: bytes, pieces: Sequence[Slab]) -> None:
        self._grants.open(handoff_id, attempt, token, pieces)

    def add(self, handoff_id: bytes, attempt: int, first_ordinal: int, pages: Pages) -> None:
        self._grants.add(handoff_id, attempt, first_ordinal, pages)

    def revoke(self, handoff_id: bytes, done: Callable[[], None]) -> None:
        self._grants.revoke(handoff_id, done)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for stream in self._idle_since:
                stream.shut()
            threads = [*self._threads, self._acceptor]
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(_CLOSE_SECONDS)
        self._listener.close()

    # ---- connections ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._is_closed:
                    return
                _log.warning("cannot accept a KV connection: %s", error)
                time.sleep(0.1)  # out of descriptors: some connection will end
                continue
            try:
                self._admit(Stream(sock, self._settings.progress_seconds))
            except OSError:
                sock.close()  # gone before it began

    def _admit(self, stream: Stream) -> None:
        thread = threading.Thread(target=self._serve, args=(stream,), name="kv-serve", daemon=True)
        with self._lock:
            if len(self._idle_since) >= self._settings.max_serving_connections:
                longest_idle = min(self._idle_since, key=self._idle_since.__getitem__)
                if self._idle_since[longest_idle] == float("inf"):
                    longest_idle = stream  # all are busy: the new one goes
                longest_idle.shut()
            self._idle_since[stream] = time.monotonic()
            self._threads.add(thread)
            if self._is_closed:
                stream.shut()
        thread.start()

    def _serve(self, stream: Stream) -> None:
        try:
            welcome(stream, self._instance_id, self._settings)
            while stream.wait_readable(self._settings.idle_seconds * _IDLE_FACTOR):
                self._mark(stream, float("inf"))
                self._answer(stream)
                self._mark(stream, time.monotonic())
        except Untrusted as error:
            self._tell(stream, error)
        except (OSError, TransportError) as error:
            _log.debug("a KV connection ended: %s", error)
        finally:
            with self._lock:
                del self._idle_since[stream]
                self._threads.discard(threading.current_thread())
                stream.close()

    def _tell(self, stream: Stream, error: Untrusted) -> None:
        with self._lock:
            is_due = time.monotonic() - self._told_at >= _TOLD_SECONDS
            self._told_at = time.monotonic() if is_due else self._told_at
        if is_due:
            _log.warning("a KV connection from %s is refused: %s", stream.peer, error.message)

    def _mark(self, stream: Stream, idle_since: float) -> None:
        with self._lock:
            self._idle_since[stream] = idle_since

    # ---- requests -------------------------------------------------------------------------------------------------

    def _answer(self, stream: Stream) -> None:
        head = RequestHead.decode(stream.read(wire.REQUEST_BYTES))
        request = Request.decode(head, stream.read(head.body_bytes))
        asked = (request.handoff_id, request.attempt, request.token, request.ordinals, request.piece)
        found = self._grants.select(*asked)
        if isinstance(found, str):
            self._refuse(stream, request, found)
            return
        grant, pages = found
        if pages.bytes_each != request.piece_bytes:
            self._refuse(stream, request, f"a page's piece has {pages.bytes_each} bytes, not {request.piece_bytes}")
            return
        plan = FramePlan.sending(request.sequence, pages)
        for step in plan.steps:
            if not self._grants.begin(grant, stream):
                self._refuse(stream, request, "the hand-off was revoked, or attached by a higher attempt")
                return
            try:
                stream.write_memory(step.vectors, step.size, _MAX_FRAME_SECONDS)
            finally:
                self._grants.end(grant, stream)

    def _refuse(self, stream: Stream, request: Request, message: str) -> None:
        text = message.encode()[: wire.MAX_MESSAGE_BYTES]
        stream.write(Frame(request.sequence, Status.REFUSED, len(text)).encode() + text)


def listen(host: str, port: int) -> socket.socket:
    """Listen on the address that `host` names, or on all if it is none of this machine's (NAT). Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            _log.warning("%s is no address of this machine, so the KV port listens on all: %s", host, error)
            listener.bind(("", port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener

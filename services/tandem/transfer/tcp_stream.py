"""One TCP connection of the KV data plane: blocking calls that give up when nothing moves, and can be cut from outside.

Made for one thread that uses it and any thread that calls `shut`.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass

from tandem.errors import TransportError
from tandem.transfer import iovec
from tandem.transfer.iovec import Iovecs
from tandem.transfer.tls import PeerTls, SecureSocket, Untrusted

_KEEPALIVE_IDLE_SECONDS = 10
_KEEPALIVE_INTERVAL_SECONDS = 5
_KEEPALIVE_PROBES = 3
_SLICES_OF_TIMEOUT = 8  # how exactly a time-out is kept: a blocked call wakes this often within one


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSettings:
    """Times and bounds of the TCP data plane. `key`: shared secret of both ends, or None. `tls`: None is plaintext."""

    connect_seconds: float
    progress_seconds: float
    idle_seconds: float
    connections: int
    key: bytes | None = None
    tls: PeerTls | None = None
    max_serving_connections: int = 256


class PeerStuck(TransportError):
    """Nothing moved for as long as it may."""


class Stream:
    """Owns the socket. Every call raises OSError if the connection is lost, PeerStuck if it makes no progress."""

    def __init__(self, sock: socket.socket, progress_seconds: float) -> None:
        sock.settimeout(None)
        slice_seconds = max(progress_seconds / _SLICES_OF_TIMEOUT, 0.01)
        timeval = struct.pack("@ll", int(slice_seconds), int(slice_seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(progress_seconds * 1000))
        self.peer = _name_of(sock)
        self._lock = threading.Lock()
        self._socket = sock
        self._secure: SecureSocket | None = None
        self._slice_seconds = slice_seconds
        self._progress_seconds = progress_seconds
        self.last_moved = time.monotonic()  # when pages last moved

    def secure(self, tls: PeerTls, *, is_listener: bool, seconds: float) -> None:
        """Encrypt from here on. Raises Untrusted if the other end is not who it should be."""
        with self._lock:
            self._secure = tls.wrap(self._socket, is_listener=is_listener, seconds=seconds)
            self._socket = self._secure.socket
        try:
            self._secure.shake_hands()
        except Untrusted:
            self._secure.dismiss()
            raise
        self._socket.settimeout(self._slice_seconds)

    def shut(self) -> None:
        """Cut the connection: calls under way end at once. Safe from any thread until `close`, and after."""
        with self._lock, contextlib.suppress(OSError):
            # Not SSLSocket's own: after that, calls under way would go on in plaintext.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:  # else `shut` could meet the descriptor's next owner
            self._socket.close()

    def wait_readable(self, seconds: float) -> bool:
        """Block until something is there to read, maybe the end; False if `seconds` passed."""
        if self._secure is not None and self._secure.has_buffered():
            return True
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def read(self, size: int, within_seconds: float | None = None) -> bytes:
        """Read exactly `size` bytes."""
        deadline = time.monotonic() + (within_seconds or self._progress_seconds)
        data = b""
        while len(data) < size:
            piece = self._read_some(size - len(data))
            if piece == b"":
                raise ConnectionResetError(errno.ECONNRESET, "the peer closed the connection")
            data += piece or b""
            self._check(deadline, size - len(data))
        return data

    def write(self, data: bytes) -> None:
        """Write all of it; it leaves at once."""
        deadline = time.monotonic() + self._progress_seconds
        while data:
            data = data[self._write_some(data) :]
            self._check(deadline, len(data))

    def read_memory(self, vectors: Iovecs, size: int) -> None:
        """Read `size` bytes straight into the memory that the vectors name."""
        self.last_moved = time.monotonic()
        while (count := self._receive(vectors)) < size:
            self._note(count)
            vectors, size = iovec.advance(vectors, count), size - count

    def write_memory(self, vectors: Iovecs, size: int, within_seconds: float) -> None:
        """Write `size` bytes straight from memory; PeerStuck also when `within_seconds` passed."""
        self.last_moved = time.monotonic()
        deadline = self.last_moved + within_seconds
        while (count := self._send(vectors)) < size:
            self._note(count)
            vectors, size = iovec.advance(vectors, count), size - count
            if self.last_moved > deadline:
                raise PeerStuck(f"the peer took less than a frame in {within_seconds:g} s")

    def _read_some(self, size: int) -> bytes | None:
        """Return at most `size` bytes, b"" at the end, None if a slice of the time-out passed."""
        if self._secure is not None:
            return self._secure.read(size)
        try:
            return self._socket.recv(size, socket.MSG_WAITALL)
        except BlockingIOError:
            return None

    def _write_some(self, data: bytes) -> int:
        if self._secure is not None:
            return self._secure.write(data)
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def _receive(self, vectors: Iovecs) -> int:
        return self._secure.receive(vectors) if self._secure is not None else iovec.receive(self._socket, vectors)

    def _send(self, vectors: Iovecs) -> int:
        return self._secure.send(vectors) if self._secure is not None else iovec.send(self._socket, vectors)

    def _note(self, count: int) -> None:
        now = time.monotonic()
        if count:
            self.last_moved = now
        elif now - self.last_moved > self._progress_seconds:
            raise PeerStuck(f"no progress for {self._progress_seconds:g} s")

    def _check(self, deadline: float, num_missing: int) -> None:
        if num_missing and time.monotonic() > deadline:
            raise PeerStuck(f"no progress: {num_missing} bytes are missing")


def connect(address: str, connect_seconds: float, progress_seconds: float) -> Stream:
    """Connect to "host:port", a text that a peer may have sent. Raises OSError."""
    try:
        sock = socket.create_connection(split_address(address), timeout=connect_seconds)
    except (ValueError, OverflowError) as error:  # no name that could be looked up, no such port
        raise OSError(f"{address!r}: {error}") from error
    return Stream(sock, progress_seconds)


def _name_of(sock: socket.socket) -> str:
    """Return who is at the other end; raises OSError if nobody is any more."""
    name = sock.getpeername()
    return str(name[0]) if isinstance(name, tuple) else "a socket without a name"


def split_address(address: str) -> tuple[str, int]:
    """Cut "host:port" or "[v6]:port"; raises OSError, as an unreachable address does."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise OSError(f"{address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

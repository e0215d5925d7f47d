"""Mutual TLS of the KV data plane: the same certificates as on the gRPC ports, by the standard library's `ssl`.

A connection is secured right after it is made, before the first byte of our own protocol. Bytes are decrypted straight
into pages and encrypted straight from them.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import ssl
import threading

from tandem.certificates import CertificateSource, Pem, carries_name, peer_contexts
from tandem.errors import TransportError
from tandem.transfer.iovec import Iovecs

_DISMISS_SECONDS = 0.2
_DISMISS_READS = 4
_TURN_BYTES = 1 << 20  # after so much a call returns, so that whoever watches sees that bytes move


class Untrusted(TransportError):
    """The other end is no pod of ours, or does not take us for one."""


class PeerTls:
    """Both ends' contexts, made anew when the certificates change. From any thread."""

    def __init__(self, source: CertificateSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._made_of: Pem | None = None
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext]

    def wrap(self, sock: socket.socket, *, is_listener: bool, seconds: float) -> SecureSocket:
        """Take a connected socket over; the handshake is still to come, each of its waits at most `seconds` long."""
        name = self._source.files.peer_name
        client, server = self._newest()
        sock.settimeout(seconds)
        if is_listener:
            secure = server.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        else:
            secure = client.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
        return SecureSocket(secure, name)

    def _newest(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        with self._lock:
            pem = self._source.current
            if pem is not self._made_of:
                self._contexts = peer_contexts(pem)
                self._made_of = pem
            return self._contexts


class SecureSocket:
    """An encrypted connection; the calls of `iovec`, as methods. Whoever made the socket closes it by `socket`."""

    def __init__(self, secure: ssl.SSLSocket, name: str) -> None:
        self.socket = secure
        self._name = name

    def shake_hands(self) -> None:
        """Prove who we are, and see who is there. Raises Untrusted, or OSError if the connection is lost."""
        try:
            self.socket.do_handshake()
        except ssl.SSLCertVerificationError as error:
            raise Untrusted(f"the other end's certificate is refused: {error.verify_message}") from error
        except ssl.SSLEOFError as error:
            raise ConnectionResetError("the other end closed the connection instead of answering TLS") from error
        except ssl.SSLError as error:
            raise Untrusted(f"no TLS with the other end: {error.reason or error}") from error
        if not carries_name(self.socket.getpeercert(), self._name):
            raise Untrusted(f"the other end's certificate does not carry the DNS name {self._name}")

    def has_buffered(self) -> bool:
        """Whether something that was received waits to be read."""
        return bool(self.socket.pending())

    def read(self, size: int) -> bytes | None:
        """Read at most `size` bytes, b"" at the end; None if the time-out passed."""
        try:
            return self.socket.recv(size)
        except TimeoutError:
            return None
        except ssl.SSLError as error:
            raise _translated(error) from error

    def write(self, data: bytes | memoryview) -> int:
        """Write a part and return its size, 0 if the time-out passed."""
        try:
            return self.socket.send(data)
        except TimeoutError:
            return 0
        except (ssl.SSLError, ConnectionError) as error:
            raise _translated(self._alert() or error) from error

    def dismiss(self) -> None:
        """Let somebody who was refused read why: closing with something unread would cut that off."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
            self.socket.settimeout(_DISMISS_SECONDS)
            for _ in range(_DISMISS_READS):
                if not socket.socket.recv(self.socket, 1 << 16):
                    return

    def _alert(self) -> ssl.SSLError | None:
        """Return what the other end said before it closed, if it did."""
        try:
            self.socket.recv(1)
        except ssl.SSLError as error:
            return error
        except OSError:
            return None
        return None

    def receive(self, vectors: Iovecs) -> int:
        """Read into memory; return how much, 0 if nothing came. Raises OSError, also at the end."""
        total = 0
        for address, length in vectors.tolist():
            memory = _memory(address, length)
            done = 0
            while done < length:
                try:
                    count = self.socket.recv_into(memory[done:])
                except TimeoutError:
                    return total
                except ssl.SSLError as error:
                    raise _translated(error) from error
                if count == 0:
                    raise ConnectionResetError("the peer closed the connection")
                done += count
                total += count
                if total >= _TURN_BYTES:
                    return total
        return total

    def send(self, vectors: Iovecs) -> int:
        """Write from memory; return how much, 0 if the time-out passed. Raises OSError."""
        total = 0
        for address, length in vectors.tolist():
            memory = _memory(address, length)
            done = 0
            while done < length:
                count = self.write(memory[done:])
                if count == 0:
                    return total
                done += count
                total += count
                if total >= _TURN_BYTES:
                    return total
        return total


def _memory(address: int, length: int) -> memoryview:
    """Name memory that the caller keeps mapped."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def _translated(error: OSError) -> OSError:
    """A peer that refuses our certificate says so only after the handshake, with an alert."""
    reason = error.reason if isinstance(error, ssl.SSLError) else ""
    return ConnectionResetError(f"the other end ended TLS: {reason or error}")

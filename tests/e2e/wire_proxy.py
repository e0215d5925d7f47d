"""A user-space proxy in front of a KV port: stalls or corrupts what the exporter sends."""

from __future__ import annotations

import contextlib
import socket
import threading


class WireProxy:
    """Forwards connections to `target`. `stalled`: hold back the exporter's bytes. `flip_at`: flip one bit there.

    `flip_at` counts the exporter's bytes over all connections; it fires once.
    """

    def __init__(self, target: tuple[str, int], *, flip_at: int | None = None) -> None:
        self._target = target
        self._flip_at = flip_at
        self._forwarded = 0
        self._lock = threading.Lock()
        self._flow = threading.Event()
        self._flow.set()
        self.held_back = threading.Event()  # bytes are waiting behind a stall
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def stall(self) -> None:
        self._flow.clear()

    def resume(self) -> None:
        self._flow.set()

    def close(self) -> None:
        self._flow.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_exporter: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if is_exporter:
                    if not self._flow.is_set():
                        self.held_back.set()
                        self._flow.wait()
                    data = self._damage(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _damage(self, data: bytes) -> bytes:
        with self._lock:
            start, self._forwarded = self._forwarded, self._forwarded + len(data)
            if self._flip_at is None or not start <= self._flip_at < self._forwarded:
                return data
            damaged = bytearray(data)
            damaged[self._flip_at - start] ^= 0x10
            self._flip_at = None
            return bytes(damaged)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])

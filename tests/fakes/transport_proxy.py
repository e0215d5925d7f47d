"""A TCP proxy that misbehaves on command: what a network or a peer can do to a connection, in user space."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass


@dataclass
class Faults:
    """What happens to bytes that the exporter sends, counted a connection. Change it at any time."""

    stall_after: int | None = None  # pass no more, keep the connection
    cut_after: int | None = None  # close it
    flip_at: int | None = None  # turn this byte around
    bytes_per_second: float | None = None
    num_faulty: int | None = None  # only the first connections; None: all


class FaultProxy:
    """Listens on `address`, forwards to `target`. `release` lets stalled connections go on."""

    def __init__(self, target: str, faults: Faults | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.faults = faults or Faults()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_connections = 0
        self._sockets: list[socket.socket] = []
        self._is_released = threading.Event()
        self.has_stalled = threading.Event()
        self._num_stalled = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def release(self) -> None:
        self._is_released.set()

    def wait_for_stalls(self, count: int, seconds: float) -> bool:
        """Block until so many connections have stalled; False if `seconds` passed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_stalled >= count, seconds)

    def cut_all(self) -> None:
        """End every connection that there is."""
        self.cut(len(self._sockets))

    def cut(self, count: int) -> None:
        """End the first connections, so many."""
        for sock in self._sockets[: 2 * count]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def stop_listening(self) -> None:
        """Let no new connection in; those that are there stay."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        self.release()
        self.cut_all()
        self.stop_listening()
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()  # the exporter is away
                    continue
                self._sockets += [near, far]
                limit = self.faults.num_faulty
                faults = self.faults if limit is None or self.num_connections < limit else Faults()
                self.num_connections += 1
                threading.Thread(target=self._forward, args=(near, far, Faults()), daemon=True).start()
                threading.Thread(target=self._forward, args=(far, near, faults), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, faults: Faults) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_piece(faults, passed)):
                if faults.flip_at is not None and passed <= faults.flip_at < passed + len(data):
                    at = faults.flip_at - passed
                    data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                sink.sendall(data)
                passed += len(data)
                if faults.bytes_per_second is not None:
                    time.sleep(len(data) / faults.bytes_per_second)
                if faults.cut_after is not None and passed >= faults.cut_after:
                    break
                if faults.stall_after is not None and passed >= faults.stall_after:
                    with self._changed:
                        self._num_stalled += 1
                        self._changed.notify_all()
                    self.has_stalled.set()
                    self._is_released.wait()
                    faults = Faults()
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _piece(faults: Faults, passed: int) -> int:
    """Read no further than the next fault."""
    limits = [limit - passed for limit in (faults.stall_after, faults.cut_after) if limit is not None]
    return max(1, min([1 << 16, *limits]))

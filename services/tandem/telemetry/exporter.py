"""The port for people and probes: /metrics, /livez and /readyz over plain HTTP, in threads of their own.

A scrape does not wait for the event loop, nor it for a scrape; a probe is answered even if the loop is stuck. What is
served is no secret, so there is no TLS here; a NetworkPolicy says who may come.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tandem.errors import ConfigError
from tandem.telemetry.health import Health

MAX_CONNECTIONS = 32  # at once; more are closed unanswered
CONNECTION_SECONDS = 10.0  # for a client to say what it wants, and to take the answer
_TEXT = "text/plain; charset=utf-8"


class Exporter:
    """Serves `registry` and `health` at http://host:port until `close`."""

    def __init__(self, registry: CollectorRegistry, health: Health, host: str, port: int) -> None:
        """Port 0 takes any free one. Raises ConfigError if the address cannot be had."""
        try:
            self._server = _Server(registry, health, host, port)
        except OSError as error:
            raise ConfigError(f"server.metrics_port: cannot listen on {host}:{port}: {error}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="exporter", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, registry: CollectorRegistry, health: Health, host: str, port: int) -> None:
        self.registry = registry
        self.health = health
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Bind without looking up the host's full name, which takes seconds where no resolver answers."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away or dawdled is nobody's fault here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CONNECTION_SECONDS
    protocol_version = "HTTP/1.0"  # a connection a request: scrapes and probes are seconds apart
    server_version = "tandem"
    sys_version = ""

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        match path:
            case "/metrics":
                self._metrics()
            case "/livez":
                self._probe(self.server.health.fault())
            case "/readyz":
                self._probe(self.server.health.not_ready())
            case _:
                self._reply(404, _TEXT, b"there are /metrics, /livez and /readyz\n")

    def _metrics(self) -> None:
        encode, content_type = choose_encoder(self.headers.get("Accept") or "")
        self._reply(200, content_type, encode(self.server.registry))

    def _probe(self, fault: str) -> None:
        self._reply(503 if fault else 200, _TEXT, f"{fault or 'ok'}\n".encode())

    def _reply(self, status: int, content_type: str, body: bytes) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a probe every second is no news."""

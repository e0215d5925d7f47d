"""Prometheus over HTTP, in a thread of its own: a scrape does not wait for the event loop, nor it for a scrape."""

from __future__ import annotations

from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from tandem.errors import ConfigError


class Exporter:
    """Serves `registry` at http://host:port/metrics until `close`."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Port 0 takes any free one. Raises ConfigError if the address cannot be had."""
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(f"server.metrics_port: cannot listen on {host}:{port}: {error}") from error
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

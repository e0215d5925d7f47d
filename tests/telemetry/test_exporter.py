"""The port of metrics and probes: what it says, to whom, and that nobody can keep it busy."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry

from tandem.errors import ConfigError
from tandem.telemetry import exporter as exporter_module
from tandem.telemetry.exporter import MAX_CONNECTIONS, Exporter
from tandem.telemetry.gateway import GatewayMetrics
from tandem.telemetry.health import BEAT_SECONDS, STUCK_SECONDS, Health


class State:
    """What a program would say of itself."""

    def __init__(self) -> None:
        self.not_ready = "starting: loading"
        self.fault = ""
        self.now = 0.0
        self.health = Health(lambda: self.not_ready, lambda: self.fault, clock=lambda: self.now)


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def get(state: State) -> Iterator[Callable[[str], tuple[int, str]]]:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    exporter = Exporter(registry, state.health, "127.0.0.1", 0)

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    get.port = exporter.port  # type: ignore[attr-defined]
    yield get
    exporter.close()


Get = Callable[[str], tuple[int, str]]


def test_metrics_and_probes(state: State, get: Get) -> None:
    assert "tandem_gateway_inflight" in get("/metrics")[1]
    assert get("/readyz") == (503, "starting: loading\n")
    assert get("/livez") == (200, "ok\n")
    state.not_ready = ""
    assert get("/readyz?verbose") == (200, "ok\n")
    assert get("/else")[0] == 404


def test_a_fault_fails_both_and_a_missing_peer_only_readiness(state: State, get: Get) -> None:
    state.fault = "the rank is stuck"
    assert get("/livez") == get("/readyz") == (503, "the rank is stuck\n")


def test_a_loop_that_stands_still_is_found_from_outside(state: State, get: Get) -> None:
    state.not_ready = ""

    async def beat_once() -> None:
        state.health.start()
        await asyncio.sleep(0)

    asyncio.run(beat_once())  # ends the loop, and with it the beat
    state.now = STUCK_SECONDS
    assert get("/livez")[0] == 200
    state.now = STUCK_SECONDS + 2 * BEAT_SECONDS
    assert get("/livez") == (503, f"the event loop has not run for {state.now:.0f} s\n")


def test_idle_connections_neither_pile_up_nor_stay(state: State, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module._Handler, "timeout", 0.3)
    address = ("127.0.0.1", get.port)  # type: ignore[attr-defined]
    idle = [socket.create_connection(address, timeout=5) for _ in range(MAX_CONNECTIONS)]
    refused = socket.create_connection(address, timeout=5)
    assert refused.recv(1) == b"", "one too many is closed at once"
    deadline = time.monotonic() + 5
    while True:
        try:
            if get("/livez")[0] == 200:
                break
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    for connection in (*idle, refused):
        connection.close()


def test_an_address_in_use(get: Get) -> None:
    port: int = get.port  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=f"metrics_port.*{port}"):
        Exporter(CollectorRegistry(), Health(lambda: ""), "127.0.0.1", port)

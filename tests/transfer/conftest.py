"""Pairs of peers over each transport."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tandem.core.messages.handoff import RankEndpoint
from tandem.transfer.choice import mooncake_absence
from tests.fakes.transport_loopback import LOOPBACK
from tests.fakes.transport_proxy import FaultProxy
from tests.transfer.peer import TCP_TLS, Peer, Shared

MOONCAKE = pytest.param("mooncake-tcp", marks=pytest.mark.mooncake)
ALL_TRANSPORTS = [LOOPBACK, "tcp", TCP_TLS, MOONCAKE]
PROCESS_TRANSPORTS = ["tcp", TCP_TLS, MOONCAKE]

NewPeer = Callable[..., Peer]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs Mooncake where it cannot be loaded."""
    if reason := mooncake_absence():
        for item in items:
            if item.get_closest_marker("mooncake"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def new_peer() -> Iterator[NewPeer]:
    """Make peers that end with the test."""
    peers: list[Peer] = []

    def make(transport: str, **options: Any) -> Peer:
        peers.append(Peer(transport, **options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Peer, Peer]]:
    """An exporter and an importer, shared by the tests of a module; parametrize it indirectly with the transport."""
    exporter, importer = Peer(request.param, seed=1), Peer(request.param, seed=2)
    yield exporter, importer
    exporter.close()
    importer.close()


# ---- the TCP plane, plain and encrypted, of which a proxy can break the wire -----------------------------------------

PAGE_BYTES = 64 << 10
NUM_PAGES = 128  # 8 MiB
ALL = range(NUM_PAGES)


@pytest.fixture(scope="module", params=["tcp", TCP_TLS])
def plane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exporter(plane: str) -> Iterator[Peer]:
    peer = Peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=1)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def importer(plane: str) -> Iterator[Peer]:
    peer = Peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=2)
    yield peer
    peer.close()


@pytest.fixture
def shared(exporter: Peer) -> Iterator[Shared]:
    handoff_id = os.urandom(16)
    yield exporter.export(handoff_id, ALL)
    exporter.revoke(handoff_id)


@pytest.fixture
def proxy(exporter: Peer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(exporter.endpoint.address)
    yield proxy
    proxy.close()


def through(proxy: FaultProxy, shared: Shared) -> RankEndpoint:
    return replace(shared.owner.endpoint, address=proxy.address)


def first_pages(count: int, shared: Shared, proxy: FaultProxy) -> dict[str, object]:
    """Changes of a pull: only so many pages, and through the proxy."""
    return {
        "endpoint": through(proxy, shared),
        "ordinals": tuple(range(count)),
        "checksums": shared.checksums[: count * 8],
        "remote_pages": b"",
    }

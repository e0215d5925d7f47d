"""Pairs of peers over each transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tandem.transfer.choice import mooncake_absence
from tests.fakes.transport_loopback import LOOPBACK
from tests.transfer.peer import TCP_TLS, Peer

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

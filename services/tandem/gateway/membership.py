"""Where workers are: what every kind of discovery publishes, and the two kinds that need nobody's leave.

An endpoint is an address and whether it is on its way out; who a worker is and what it can do, it says itself over its
session. A set that could not be renewed stays: nobody loses a worker because a name server or an API server is away.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

RESOLVE_SECONDS = 10.0  # one answer of the resolver
MAX_ENDPOINTS = 4096  # more are left out, and logged
_NOBODY = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One worker's address, host:port. `draining`: it gets no new requests, what runs there goes on."""

    address: str
    draining: bool = False


Publish = Callable[[tuple[Endpoint, ...]], None]


class Discovery(Protocol):
    """Publishes the whole set in the event loop, whenever it has changed."""

    def start(self, publish: Publish) -> None:
        """Begin; call it in the running event loop."""

    async def close(self) -> None:
        """Publish no more."""


class StaticDiscovery:
    """The addresses of the configuration."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._endpoints = tuple(Endpoint(address) for address in dict.fromkeys(addresses))

    def start(self, publish: Publish) -> None:
        publish(self._endpoints)

    async def close(self) -> None:
        """Nothing runs."""


class DnsDiscovery:
    """Resolves names (of headless services) again and again; says nothing about who is on the way out."""

    def __init__(self, names: Iterable[str], period_seconds: float, failed: Callable[[str], None]) -> None:
        """`names` as host:port; `failed("dns")` counts a name that could not be resolved."""
        self._names = tuple(dict.fromkeys(names))
        self._period_seconds = period_seconds
        self._failed = failed
        self._known: dict[str, frozenset[str]] = {}
        self._failing: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self, publish: Publish) -> None:
        self._task = asyncio.create_task(self._run(publish), name="discovery by DNS")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self, publish: Publish) -> None:
        published: tuple[Endpoint, ...] | None = None
        while True:
            await asyncio.gather(*(self._resolve(name) for name in self._names))
            endpoints = bounded(sorted({Endpoint(a) for found in self._known.values() for a in found}))
            if endpoints != published:
                publish(endpoints)
                published = endpoints
            await asyncio.sleep(self._period_seconds)

    async def _resolve(self, name: str) -> None:
        host, _, port = name.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            if isinstance(error, socket.gaierror) and error.errno in _NOBODY:
                self._known[name] = frozenset()  # a headless service without ready pods has no addresses
                return
            self._failed("dns")
            if name not in self._failing:
                _logger.warning("cannot resolve %s, its %d addresses stay: %s", name, len(self._of(name)), error)
            self._failing.add(name)
            return
        self._failing.discard(name)
        self._known[name] = frozenset(host_port(str(address[0]), int(address[1])) for *_, address in found)

    def _of(self, name: str) -> frozenset[str]:
        return self._known.get(name, frozenset())


def host_port(host: str, port: int) -> str:
    """Return host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bounded(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints, at most MAX_ENDPOINTS of them."""
    kept = tuple(endpoints)
    if len(kept) > MAX_ENDPOINTS:
        _logger.error("%d workers were found, %d of them are left out", len(kept), len(kept) - MAX_ENDPOINTS)
    return kept[:MAX_ENDPOINTS]

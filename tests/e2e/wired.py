"""A prefill worker whose KV port is reached through a proxy only."""

from __future__ import annotations

from tests.e2e.service import Service, free_port
from tests.e2e.streams import TCP
from tests.fakes.transport_proxy import FaultProxy, Faults


class Wired:
    """Without faults given, the proxy stalls. By its address the worker comes before others that have as much to do."""

    def __init__(self, service: Service, *flags: str, faults: Faults | None = None) -> None:
        port = free_port()
        self.proxy = FaultProxy(f"127.0.0.1:{port}", faults or Faults(stall_after=4096))
        where = ("--server.port", str(free_port()))
        towards = ("--transfer.port", str(port), "--transfer.advertise-address", self.proxy.address)
        self.prefill = service.worker("prefill", *TCP, *where, *towards, *flags)

"""What a worker listens on: sessions of gateways, hand-offs of decode workers, and the port of metrics and probes.

Hand-offs may have a port of their own (server.handoff_port), so that a network policy can let gateways reach the one
and decode workers the other. All of them share one state: not ready, ready, draining.
"""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from tandem.certificates import CertificateSource
from tandem.config import ServerConfig
from tandem.rpc.gen.admin.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from tandem.rpc.gen.handoff.v1.handoff_service_pb2_grpc import add_HandoffServiceServicer_to_server
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from tandem.rpc.server import RpcServer
from tandem.rpc.tls import PeerCheck, server_credentials
from tandem.telemetry.exporter import Exporter
from tandem.telemetry.health import Health
from tandem.worker.admin import AdminServer
from tandem.worker.frontend import Frontend
from tandem.worker.handoff_server import HandoffServer

_WORKER_SERVICE = "tandem.worker.v1.WorkerService"
_ADMIN_SERVICE = "tandem.admin.v1.AdminService"
_HANDOFF_SERVICE = "tandem.handoff.v1.HandoffService"


class WorkerServers:
    """The servers of one worker. `address` and `handoff_address` are where others reach it, once `start` is over."""

    def __init__(
        self,
        config: ServerConfig,
        registry: CollectorRegistry,
        health: Health,
        frontend: Frontend,
        handoffs: HandoffServer | None,
        certificates: CertificateSource | None = None,
        admin: AdminServer | None = None,
    ) -> None:
        """`certificates`: only pods that have such ones are served; None: everybody, in plaintext."""
        self.address = ""
        self.handoff_address = ""
        self._config = config
        self._registry = registry
        self._health = health
        self._frontend = frontend
        self._handoffs = handoffs
        self._admin = admin
        self._certificates = certificates
        self._servers: list[RpcServer] = []
        self._exporter: Exporter | None = None

    @property
    def metrics_port(self) -> int | None:
        return self._exporter.port if self._exporter is not None else None

    async def start(self) -> None:
        """Listen and answer, not ready yet; raises ConfigError if an address cannot be had."""
        config = self._config
        server = self._new_server()
        server.add(add_WorkerServiceServicer_to_server, self._frontend, _WORKER_SERVICE)
        if self._admin is not None:
            server.add(add_AdminServiceServicer_to_server, self._admin, _ADMIN_SERVICE)
        handoff_server = server
        if self._handoffs is not None:
            if config.handoff_port >= 0:
                handoff_server = self._new_server()
            handoff_server.add(add_HandoffServiceServicer_to_server, self._handoffs, _HANDOFF_SERVICE)
        self.address = self._reached_at(self._listen(server, config.port))
        if self._handoffs is not None:
            apart = handoff_server is not server
            port = self._listen(handoff_server, config.handoff_port) if apart else 0
            self.handoff_address = self._reached_at(port) if apart else self.address
        if config.metrics_port >= 0:
            host = config.metrics_host or config.host
            self._exporter = Exporter(self._registry, self._health, host, config.metrics_port)
        for each in self._servers:
            await each.start()
        self._health.start()

    async def set_ready(self) -> None:
        """Say that new work is welcome."""
        for server in self._servers:
            await server.set_ready(True)

    async def drain(self) -> None:
        """Say that it is not, from now on; what runs goes on."""
        for server in self._servers:
            await server.drain()

    async def stop(self, grace_seconds: float) -> None:
        """Give calls that run `grace_seconds`, then close everything. Harmless before `start`."""
        await asyncio.gather(*(server.stop(grace_seconds) for server in self._servers))
        self._health.stop()
        if self._exporter is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._exporter.close)

    def _new_server(self) -> RpcServer:
        admit = PeerCheck(self._certificates.files.peer_name) if self._certificates is not None else None
        server = RpcServer(reflection=self._config.reflection, admit=admit)
        self._servers.append(server)
        return server

    def _listen(self, server: RpcServer, port: int) -> int:
        credentials = None
        if self._certificates is not None:
            credentials = server_credentials(self._certificates, require_client=True)
        return server.listen(self._config.host, port, credentials)

    def _reached_at(self, port: int) -> str:
        host = self._config.advertise_host or self._config.host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

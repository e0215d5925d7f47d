"""Builds the gRPC server of a program: options, error mapping, health, reflection. Not here: the servicers.

Health has the overall name "", each service's full name and "readiness", which follow `set_ready`, and "liveness",
which is SERVING for as long as the process answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from tandem.errors import ConfigError
from tandem.rpc.interceptor import ErrorInterceptor
from tandem.rpc.options import WORKER_MESSAGE_BYTES, server_options

LIVENESS = "liveness"
READINESS = "readiness"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """One grpc.aio server. Build it inside the running event loop; `add` services, `listen`, `start`, `stop`."""

    def __init__(
        self,
        *,
        max_message_bytes: int = WORKER_MESSAGE_BYTES,
        reflection: bool = True,
        interceptors: Sequence[aio.ServerInterceptor] = (),
        admit: Callable[[aio.ServicerContext[Any, Any]], None] | None = None,
        share_port: bool = False,
        max_connection_age_seconds: float | None = None,
    ) -> None:
        """`interceptors` run outside of the error mapping: they see statuses, not exceptions. `admit` runs inside."""
        self._server = aio.server(
            interceptors=[*interceptors, ErrorInterceptor(admit)],
            options=server_options(
                max_message_bytes, share_port=share_port, max_connection_age_seconds=max_connection_age_seconds
            ),
        )
        self._reflection = reflection
        self._health: Any = health_aio.HealthServicer()
        self._names: list[str] = []
        self._ready = False
        self._draining = False

    def add(self, add_to_server: Callable[[Any, aio.Server], None], servicer: object, full_name: str) -> None:
        """Register a servicer with its generated `add_XServicer_to_server`; `full_name` as package.Service."""
        add_to_server(servicer, self._server)
        self._names.append(full_name)

    def listen(self, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
        """Bind and return the port (any free one for 0); raises ConfigError if the address cannot be had."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is not None:
                return self._server.add_secure_port(address, credentials)
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from error

    async def start(self) -> None:
        """Answer calls. Every name but liveness is NOT_SERVING until `set_ready(True)`."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._reflection:
            names = [*self._names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
            reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self._server)
        await self._health.set(LIVENESS, _SERVING)
        await self._publish()
        await self._server.start()

    @property
    def ready(self) -> bool:
        return self._ready and not self._draining

    @property
    def draining(self) -> bool:
        return self._draining

    async def set_ready(self, ready: bool) -> None:
        """Say whether new work is welcome. Ignored once the server drains."""
        if ready != self._ready and not self._draining:
            self._ready = ready
            await self._publish()

    async def drain(self) -> None:
        """Be NOT_SERVING from now on, liveness excepted; calls are still answered."""
        if not self._draining:
            self._draining = True
            await self._publish()

    async def stop(self, grace_seconds: float | None) -> None:
        """Drain, refuse new calls, give running ones `grace_seconds`, cancel the rest."""
        await self.drain()
        await self._server.stop(grace_seconds)

    async def _publish(self) -> None:
        status = _SERVING if self.ready else _NOT_SERVING
        for name in ("", READINESS, *self._names):
            await self._health.set(name, status)

"""The gateway put together: tokenizer, fleet, dispatch, the gRPC server, metrics. `main` runs it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from tandem.certificates import between_pods, client_facing
from tandem.config import Config
from tandem.errors import ConfigError, InvalidRequest
from tandem.gateway.admission import Admission
from tandem.gateway.discovery import choose_discovery
from tandem.gateway.dispatch import Dispatcher
from tandem.gateway.fleet import Fleet
from tandem.gateway.frontend import InferenceServicer
from tandem.gateway.model_files import ModelFiles, load_model_files
from tandem.gateway.preparation import Preparation
from tandem.gateway.resumption import ResumptionRules
from tandem.gateway.resumption_budget import ResumptionBudget
from tandem.gateway.tokenizer import Tokenizer
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1 import inference_service_pb2_grpc as pb_grpc
from tandem.rpc.options import GATEWAY_MESSAGE_BYTES
from tandem.rpc.server import RpcServer
from tandem.rpc.tls import ClientTls, server_credentials
from tandem.telemetry.drain import DrainClock
from tandem.telemetry.exporter import Exporter
from tandem.telemetry.gateway import GatewayMetrics
from tandem.telemetry.health import Health
from tandem.telemetry.tracing import open_tracer

_logger = logging.getLogger(__name__)
SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
STOP_SECONDS = 5.0  # what cancelled handlers have to end in, after the drain


class Gateway:
    """One gateway process. Build it inside the running loop with `create`; `start`, then `stop`."""

    def __init__(self, config: Config, files: ModelFiles, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._registry = CollectorRegistry()
        self._exporter: Exporter | None = None
        self._changed = asyncio.Event()
        self._health_task: asyncio.Task[None] | None = None
        self._health = Health(self._not_ready)
        self._certificates = client_facing(config.tls)
        self._peer_certificates = between_pods(config.tls)
        gateway_id = uuid.uuid4().hex
        self._tracer = open_tracer(
            config.telemetry, service="tandem-gateway", instance=gateway_id, version=version("tandem-serve")
        )
        self.fleet = Fleet(
            gateway_id=gateway_id,
            model=files.name,
            on_change=self._fleet_changed,
            tls=ClientTls.between_pods(self._peer_certificates) if self._peer_certificates is not None else None,
        )
        self.admission = Admission(config.gateway.max_inflight_requests)
        self._server = RpcServer(max_message_bytes=GATEWAY_MESSAGE_BYTES, reflection=config.server.reflection)
        self._drain_clock = DrainClock()
        metrics = GatewayMetrics(self._registry, genai_model=files.name if config.telemetry.genai_metrics else "")
        metrics.watch(
            inflight=lambda: self.admission.inflight,
            ready_workers=self.fleet.count_ready,
            sessions=lambda state: self.fleet.count_sessions()[state],
            loop_lag=lambda: self._health.loop_lag_seconds,
            drain=self._drain_clock,
        )
        addresses = (*config.gateway.prefill, *config.gateway.decode)
        self._discovery = choose_discovery(config.discovery, addresses, metrics.discovery_restarted)
        self._dispatcher = Dispatcher(
            self.fleet,
            max_prefill_peers=config.gateway.prefill_peers,
            stream_buffer_tokens=config.gateway.stream_buffer_tokens,
        )
        servicer = InferenceServicer(
            preparation=_preparation(config, files, tokenizer, self.fleet),
            tokenizer=tokenizer,
            fleet=self.fleet,
            dispatcher=self._dispatcher,
            admission=self.admission,
            metrics=metrics,
            rules=_resumption_rules(config, metrics),
            max_prompt_bytes=config.gateway.max_prompt_bytes,
            request_seconds_max=config.gateway.request_seconds_max,
            tracer=self._tracer,
        )
        self._server.add(pb_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE)

    @classmethod
    async def create(cls, config: Config) -> Gateway:
        """Load the model's small files, off the loop: they may have to be downloaded. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        files = await loop.run_in_executor(None, load_model_files, config.model)
        tokenizer = await loop.run_in_executor(None, Tokenizer, files)
        return cls(config, files, tokenizer)

    @property
    def metrics_port(self) -> int | None:
        return self._exporter.port if self._exporter is not None else None

    async def start(self) -> str:
        """Serve, and return the address; health is NOT_SERVING until a worker is ready. Raises ConfigError."""
        self._tracer.start()
        server = self._config.server
        credentials = None
        if self._certificates is not None:
            credentials = server_credentials(self._certificates, require_client=bool(self._config.tls.client_ca_file))
        port = self._server.listen(server.host, server.port, credentials)
        for certificates in (self._certificates, self._peer_certificates):
            if certificates is not None:
                certificates.start()
        if server.metrics_port >= 0:
            self._exporter = Exporter(
                self._registry, self._health, server.metrics_host or server.host, server.metrics_port
            )
        await self._server.start()
        self._health.start()
        self._health_task = asyncio.create_task(self._follow_health(), name="gateway health")
        self.fleet.start()
        self._discovery.start(self.fleet.update)
        return f"{server.advertise_host or server.host}:{port}"

    async def drain(self) -> None:
        """Be not ready from now on; new requests are still taken, for those who have not heard of it."""
        server = self._config.server
        self._drain_clock.begin(server.drain_delay_seconds + server.drain_seconds)
        await self._server.drain()

    async def stop(self, drain_seconds: float) -> None:
        """Take no new work, finish streams for at most `drain_seconds`, then leave nothing behind."""
        try:
            await asyncio.wait_for(self._server.stop(drain_seconds), drain_seconds + STOP_SECONDS)
        except TimeoutError:
            _logger.error("%d requests did not end when cancelled", self.admission.inflight)
        if self._health_task is not None:
            self._health_task.cancel()
        await self._discovery.close()
        await self.fleet.close()
        self._tokenizer.close()
        self._health.stop()
        for certificates in (self._certificates, self._peer_certificates):
            if certificates is not None:
                certificates.close()
        await asyncio.get_running_loop().run_in_executor(None, self._tracer.close)
        if self._exporter is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._exporter.close)

    async def hurry(self) -> None:
        """Cut a `stop` short: what still streams is cancelled."""
        await self._server.stop(0)

    def _not_ready(self) -> str:
        if self._server.draining:
            return "draining"
        return "" if self._server.ready else "no decode or unified worker is ready"

    def _fleet_changed(self) -> None:
        self._changed.set()
        self._dispatcher.fleet_changed()

    async def _follow_health(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._server.set_ready(self.fleet.serves)


def _resumption_rules(config: Config, metrics: GatewayMetrics) -> ResumptionRules:
    gateway = config.gateway
    budget = ResumptionBudget(gateway.resumption_burst, gateway.resumptions_per_second, time.monotonic)
    return ResumptionRules(max_resumptions=gateway.max_resumptions, budget=budget, counters=metrics)


def _preparation(config: Config, files: ModelFiles, tokenizer: Tokenizer, fleet: Fleet) -> Preparation:
    try:
        return Preparation(
            files,
            tokenizer,
            limits=lambda: fleet.limits,
            adapters=lambda: fleet.adapters,
            max_prompt_bytes=config.gateway.max_prompt_bytes,
        )
    except InvalidRequest as error:
        raise ConfigError(f"model.path: generation_config.json of {files.folder}: {error.message}") from error

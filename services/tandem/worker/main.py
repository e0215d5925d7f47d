"""The worker program: composes frontend, hand-off ends and replicas for one role, and sees it through its life.

The frontend is this process; it holds no torch. The rank 0 of each replica is a process of its own: when one dies, the
worker says why and ends, within two seconds; when this process dies, the kernel takes the ranks along.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry

from tandem.certificates import between_pods
from tandem.collector import keep_what_is_here
from tandem.config import Config, Role
from tandem.core.merged_load import merge_loads
from tandem.core.messages import handoff, requests, training
from tandem.core.messages.worker import AdaptersChanged, RankFailed, RankReady, StartupProgress, Stats, WorkerInfo
from tandem.core.stats import LoadSnapshot
from tandem.engine.host import usable_cpus
from tandem.errors import TandemError
from tandem.rpc.convert_worker import worker_info
from tandem.rpc.tls import ClientTls
from tandem.telemetry.drain import DrainClock
from tandem.telemetry.health import Health
from tandem.telemetry.tracing import open_tracer
from tandem.telemetry.worker import ReplicaFigures, WorkerFacts, WorkerVitals, register_worker
from tandem.worker.admin import AdminServer
from tandem.worker.frontend import Frontend
from tandem.worker.handoff_client import HandoffClient
from tandem.worker.handoff_server import HandoffServer
from tandem.worker.lifespan import StopSignals
from tandem.worker.messages import StepEnded
from tandem.worker.peer_channels import PeerChannels
from tandem.worker.replica_router import ReplicaRouter
from tandem.worker.replica_set import ReplicaSet
from tandem.worker.servers import WorkerServers
from tandem.worker.spans import WorkerSpans

SILENT_SECONDS = 60.0  # a rank that says nothing for so long is stuck: liveness fails
STOP_SECONDS = 2.0  # for streams to take their last messages
DRAIN_MARGIN_SECONDS = 5.0  # beyond drain_seconds and a lease; a rank that is not done by then is ended
MERGE_SECONDS = 0.05  # the loads of several replicas are added up so often at most
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker serves: what its ready line says."""

    address: str  # host:port of its gRPC services
    instance_id: bytes
    metrics_port: int | None
    rank: RankReady


async def serve(
    role: Role,
    config: Config,
    ready: Callable[[WorkerReady], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Run a worker until it is told to stop, or its rank dies; return the exit code.

    Call it in the main thread of a process of its own: it takes over SIGTERM and SIGINT. `ready` is called once,
    `progress` with what the start is doing. Raises ConfigError if it cannot listen.
    """
    worker = _Worker(role, config, ready, progress)
    with StopSignals() as stop:
        try:
            await worker.start()
            return await worker.run(stop)
        finally:
            await worker.close()


class _Worker:
    def __init__(
        self,
        role: Role,
        config: Config,
        ready: Callable[[WorkerReady], None] | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._role: Role = role
        self._config = config
        self._on_ready = ready
        self._on_progress = progress
        self._instance_id = secrets.token_bytes(16)
        host = config.server.advertise_host or config.server.host
        self._replicas = ReplicaSet(role, config, self._instance_id, host, usable_cpus())
        self._router = ReplicaRouter(
            self._replicas.send, config.handoff, prefix_cache=config.cache.prefix_cache, clock=time.monotonic
        )
        self._loads = [LoadSnapshot()] * len(self._replicas)
        self._merging: asyncio.TimerHandle | None = None
        self._num_steps = 0  # turns of all loops
        self._doing = "starting"  # what the start is at
        self._registry = CollectorRegistry()
        info = self._starting_info()
        self._tracer = open_tracer(
            config.telemetry, service=f"tandem-{role}", instance=info.worker_id, version=info.version
        )
        spans = self._spans = WorkerSpans(self._tracer)
        self._frontend = Frontend(self._router.send, info, spans)
        self._handoff_server = HandoffServer(self._router.send, self._instance_id, spans) if role == "prefill" else None
        self._certificates = between_pods(config.tls)
        self._handoff_clients = self._clients() if role == "decode" else []
        self._admin = AdminServer(partial(self._replicas.send, 0), config.lora) if config.server.admin else None
        self._health = Health(self._not_ready, self._fault)
        self._drain_clock = DrainClock()
        self._servers = WorkerServers(
            config.server,
            self._registry,
            self._health,
            self._frontend,
            self._handoff_server,
            self._certificates,
            self._admin,
        )
        self._handlers = self._dispatch_table()

    async def start(self) -> None:
        """Start the ranks' processes, listen, not ready yet, and tell the ranks who they are."""
        await self._replicas.spawn(self._receive)  # before gRPC has threads, which a fork does not like
        self._tracer.start()
        if self._certificates is not None:
            self._certificates.start()
        await self._servers.start()
        self._frontend.start()
        self._replicas.start()

    async def run(self, stop: StopSignals) -> int:
        """Wait for the end, whoever brings it, and return the exit code."""
        asked = asyncio.create_task(stop.asked.wait())
        await asyncio.wait((asked, self._replicas.exit_code), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self._replicas.exit_code.done():
            return self._rank_died()
        if self._frontend.info.state == "starting":
            return 0  # nobody was served yet
        return await self._drain(stop)

    async def close(self) -> None:
        """End everything that is still there."""
        await asyncio.gather(*(client.close() for client in self._handoff_clients))
        await self._frontend.close()
        await self._servers.stop(STOP_SECONDS if self._replicas.ended_well else 0)
        await self._replicas.close()
        if self._certificates is not None:
            self._certificates.close()
        self._spans.close()
        await asyncio.get_running_loop().run_in_executor(None, self._tracer.close)

    async def _drain(self, stop: StopSignals) -> int:
        grace = self._config.server.drain_seconds
        _logger.info("stopping: %d requests have %g s to end", self._frontend.num_requests, grace)
        longest = grace + (self._config.handoff.lease_seconds if self._role == "prefill" else 0)
        self._drain_clock.begin(longest)
        await self._servers.drain()
        self._frontend.set_state("draining")
        if self._handoff_server is not None:
            self._handoff_server.drain()
        if self._admin is not None:
            self._admin.drain()
        exit_code = self._replicas.exit_code
        self._replicas.stop(requests.Drain(grace))
        insisted = asyncio.create_task(stop.insisted.wait())
        await asyncio.wait(
            (insisted, exit_code), timeout=longest + DRAIN_MARGIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if insisted.done() and not exit_code.done():
            _logger.info("stopping at once: %d requests are handed back", self._frontend.num_requests)
            self._replicas.stop(requests.Drain(0.0))
            await asyncio.wait((exit_code,), timeout=DRAIN_MARGIN_SECONDS)
        insisted.cancel()
        if exit_code.done():
            return 0 if self._replicas.ended_well else self._rank_died()
        _logger.error("stopped with %d requests unfinished", self._frontend.num_requests)
        return 1

    def _rank_died(self) -> int:
        why, code = self._replicas.why_ended()
        _logger.error("%s", why)
        return code

    # ---- the ranks' messages --------------------------------------------------------------------------------------

    def _receive(self, replica: int, messages: list[Any]) -> None:
        for message in messages:
            self._router.heard(replica, message)
            self._handlers[type(message)](replica, message)

    def _dispatch_table(self) -> dict[type, Callable[[int, Any], None]]:
        frontend, clients = self._frontend, self._handoff_clients
        table: dict[type, Callable[[int, Any], None]] = {
            StartupProgress: self._progressed,
            RankReady: self._became_ready,
            RankFailed: self._replicas.failed,
            Stats: self._reported,
            AdaptersChanged: lambda replica, changed: frontend.adapters_changed(
                self._replicas.adapters_changed(replica, changed)
            ),
            StepEnded: self._step_ended,
            requests.Tokens: lambda replica, tokens: frontend.tokens(tokens),
            requests.Ended: lambda replica, ended: frontend.ended(ended),
            handoff.OpenStream: lambda replica, effect: clients[replica].open(effect),
            handoff.SendRelease: lambda replica, effect: clients[replica].release(effect),
            handoff.DropStream: lambda replica, effect: clients[replica].drop(effect),
        }
        server = self._handoff_server
        if server is not None:
            sends = (handoff.SendAccepted, handoff.SendAnnounce, handoff.SendFirstToken, handoff.SendComplete)
            table |= dict.fromkeys(sends, lambda replica, effect: server.respond(effect))
            table[handoff.EndStream] = lambda replica, effect: server.end(effect)
        admin = self._admin
        if admin is not None:
            told = (training.TrainingStarted, training.TrainingStep, training.TrainingEnded)
            table |= dict.fromkeys(told, lambda replica, event: admin.heard(event))
        return table

    def _clients(self) -> list[HandoffClient]:
        """A client for each replica: its scheduler numbers its streams itself."""
        tls = ClientTls.between_pods(self._certificates) if self._certificates is not None else None
        seconds = self._config.handoff.connect_seconds
        return [
            HandoffClient(partial(self._replicas.send, replica), PeerChannels(seconds, tls=tls), self._spans)
            for replica in range(len(self._replicas))
        ]

    def _not_ready(self) -> str:
        state = self._frontend.info.state
        return {"ready": "", "starting": f"starting: {self._doing}"}.get(state, state)

    def _fault(self) -> str:
        """A rank that has started reports every few seconds, whether or not it has work."""
        silent = max(self._replicas.silent_seconds())
        if self._frontend.info.state == "starting" or silent < SILENT_SECONDS:
            return ""
        where = "" if len(self._replicas) == 1 else f" of replica {self._replicas.silent_seconds().index(silent)}"
        return f"the event loop of rank 0{where} has not reported for {silent:.0f} s"

    def _progressed(self, replica: int, progress: StartupProgress) -> None:
        name = "" if len(self._replicas) == 1 else f"replica {replica}: "
        self._doing = name + progress.message
        if self._on_progress is not None:
            self._on_progress(self._doing)

    def _reported(self, replica: int, stats: Stats) -> None:
        self._loads[replica] = stats.load
        if len(self._loads) == 1:
            self._frontend.stats(stats)
        elif self._merging is None:  # each replica reports by itself: one sum for all that come meanwhile
            self._merging = asyncio.get_running_loop().call_later(MERGE_SECONDS, self._merge)

    def _merge(self) -> None:
        self._merging = None
        self._frontend.stats(Stats(merge_loads(self._loads)))

    def _step_ended(self, replica: int, step: StepEnded) -> None:
        self._num_steps += 1
        self._frontend.step_ended(StepEnded(self._num_steps, step.mono_ns))

    def _became_ready(self, replica: int, rank: RankReady) -> None:
        try:
            ready = self._replicas.became_ready(replica, rank)
        except TandemError as error:
            self._replicas.give_up(replica, RankFailed(error.message))
            return
        if ready is None:
            return
        self._router.open_for(ready)
        info = worker_info(
            ready,
            worker_id=self._frontend.info.worker_id,
            instance_id=self._instance_id,
            handoff_address=self._servers.handoff_address,
            version=self._frontend.info.version,
        )
        self._frontend.open_for(ready, info)
        if self._handoff_server is not None:
            self._handoff_server.open_for(ready)
        if self._admin is not None:
            self._admin.open()
        _log_ready(self._servers.address, ready)
        self._serving = asyncio.create_task(self._servers.set_ready())
        self._export_metrics(ready)
        keep_what_is_here()
        if self._on_ready is not None:
            servers = self._servers
            self._on_ready(WorkerReady(servers.address, self._instance_id, servers.metrics_port, ready))

    def _export_metrics(self, ready: RankReady) -> None:
        info = self._frontend.info
        facts = {
            "loop": ready.loop,
            "model": ready.model,
            "dtype": ready.dtype,
            "operators": ready.operators,
            "fingerprint": ready.fingerprint,
            "version": info.version,
            "data_size": str(ready.data_size),
            "pool_pages": ready.pool_pages,
        }
        register_worker(
            self._registry,
            lambda: self._frontend.load,
            self._vitals,
            self._by_replica,
            WorkerFacts(
                role=ready.role,
                model=ready.model,
                page_tokens=ready.page_tokens,
                info=facts,
                transports=info.transports,
            ),
            vllm=self._config.telemetry.vllm_metrics,
        )

    def _vitals(self) -> WorkerVitals:
        return WorkerVitals(
            loop_silent_seconds=max(self._replicas.silent_seconds()),
            frontend_lag_seconds=self._health.loop_lag_seconds,
            sessions=self._frontend.num_sessions,
            drain_seconds=self._drain_clock.seconds(),
            drain_limit_seconds=self._drain_clock.limit_seconds(),
        )

    def _by_replica(self) -> list[ReplicaFigures]:
        return [ReplicaFigures(*each) for each in zip(self._loads, self._replicas.silent_seconds(), strict=True)]

    def _starting_info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=f"{socket.gethostname()}/{self._role}-{self._instance_id[:3].hex()}",
            instance_id=self._instance_id,
            role=self._role,
            state="starting",
            model=self._config.model.served_name or self._config.model.path,
            fingerprint="",
            version=version("tandem-serve"),
        )


def _log_ready(address: str, ready: RankReady) -> None:
    """Say once what runs here, and which transports were chosen and why."""
    _logger.info(
        "%s serves at %s: %sloop %s, operators %s, %d KV tokens, prompts up to %d tokens",
        ready.model,
        address,
        f"{ready.data_size} replicas, " if ready.data_size > 1 else "",
        ready.loop,
        ready.operators,
        ready.num_pages * ready.page_tokens,
        ready.max_req_input_len,
    )
    if ready.role == "unified":
        return
    names = [endpoint.transport for endpoint in ready.endpoints] or list(ready.imports)
    reasons = "; ".join(ready.transport_notes)
    _logger.info("KV transport: %s%s", ", ".join(names), f" ({reasons})" if reasons else "")

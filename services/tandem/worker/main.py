"""The worker program: composes frontend, hand-off ends and rank 0 for one role, and sees it through its life.

The frontend is this process; it holds no torch. Rank 0 is a process of its own: when it dies, the worker says why and
ends, within two seconds; when this process dies, the kernel takes the rank along.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry

from tandem.certificates import between_pods
from tandem.config import Config, Role
from tandem.core.messages import handoff, requests
from tandem.core.messages.worker import RankFailed, RankReady, StartupProgress, Stats, WorkerInfo
from tandem.rpc.convert_worker import worker_info
from tandem.rpc.tls import ClientTls
from tandem.telemetry.drain import DrainClock
from tandem.telemetry.health import Health
from tandem.telemetry.tracing import open_tracer
from tandem.telemetry.worker import WorkerFacts, WorkerVitals, register_worker
from tandem.worker.frontend import Frontend
from tandem.worker.handoff_client import HandoffClient
from tandem.worker.handoff_server import HandoffServer
from tandem.worker.lifespan import StopSignals
from tandem.worker.messages import StartRank, StepEnded
from tandem.worker.peer_channels import PeerChannels
from tandem.worker.rank_process import RankProcess
from tandem.worker.servers import WorkerServers
from tandem.worker.spans import WorkerSpans

SILENT_SECONDS = 60.0  # a rank that says nothing for so long is stuck: liveness fails
STOP_SECONDS = 2.0  # for streams to take their last messages
DRAIN_MARGIN_SECONDS = 5.0  # beyond drain_seconds and a lease; a rank that is not done by then is ended
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
        self._host = config.server.advertise_host or config.server.host
        self._failed: RankFailed | None = None
        self._rank: RankProcess | None = None
        self._heard = time.monotonic()  # from the rank
        self._doing = "starting"  # what the start is at
        self._registry = CollectorRegistry()
        info = self._starting_info()
        self._tracer = open_tracer(
            config.telemetry, service=f"tandem-{role}", instance=info.worker_id, version=info.version
        )
        spans = self._spans = WorkerSpans(self._tracer)
        self._frontend = Frontend(self._send, info, spans)
        self._handoff_server = HandoffServer(self._send, self._instance_id, spans) if role == "prefill" else None
        self._certificates = between_pods(config.tls)
        tls = ClientTls.between_pods(self._certificates) if self._certificates is not None else None
        channels = PeerChannels(config.handoff.connect_seconds, tls=tls)
        self._handoff_client = HandoffClient(self._send, channels, spans) if role == "decode" else None
        self._health = Health(self._not_ready, self._fault)
        self._drain_clock = DrainClock()
        self._servers = WorkerServers(
            config.server, self._registry, self._health, self._frontend, self._handoff_server, self._certificates
        )
        self._handlers = self._dispatch_table()

    async def start(self) -> None:
        """Start the rank's process, listen, not ready yet, and tell the rank who it is."""
        self._rank = await RankProcess.spawn(self._receive)  # before gRPC has threads, which a fork does not like
        self._tracer.start()
        if self._certificates is not None:
            self._certificates.start()
        await self._servers.start()
        self._frontend.start()
        self._rank.send(
            StartRank(role=self._role, config=self._config, instance_id=self._instance_id, worker_host=self._host)
        )

    async def run(self, stop: StopSignals) -> int:
        """Wait for the end, whoever brings it, and return the exit code."""
        assert self._rank is not None
        asked = asyncio.create_task(stop.asked.wait())
        await asyncio.wait((asked, self._rank.exit_code), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self._rank.exit_code.done():
            return self._rank_died(self._rank.exit_code.result())
        if self._frontend.info.state == "starting":
            return 0  # nobody was served yet
        return await self._drain(stop)

    async def close(self) -> None:
        """End everything that is still there."""
        clean = self._rank is not None and self._rank.exit_code.done() and not self._rank.exit_code.result()
        if self._handoff_client is not None:
            await self._handoff_client.close()
        await self._frontend.close()
        await self._servers.stop(STOP_SECONDS if clean else 0)
        if self._rank is not None:
            await self._rank.close()
        if self._certificates is not None:
            self._certificates.close()
        self._spans.close()
        await asyncio.get_running_loop().run_in_executor(None, self._tracer.close)

    async def _drain(self, stop: StopSignals) -> int:
        assert self._rank is not None
        grace = self._config.server.drain_seconds
        _logger.info("stopping: %d requests have %g s to end", self._frontend.num_requests, grace)
        longest = grace + (self._config.handoff.lease_seconds if self._role == "prefill" else 0)
        self._drain_clock.begin(longest)
        await self._servers.drain()
        self._frontend.set_state("draining")
        if self._handoff_server is not None:
            self._handoff_server.drain()
        self._rank.send(requests.Drain(grace))
        insisted = asyncio.create_task(stop.insisted.wait())
        await asyncio.wait(
            (insisted, self._rank.exit_code),
            timeout=longest + DRAIN_MARGIN_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if insisted.done() and not self._rank.exit_code.done():
            _logger.info("stopping at once: %d requests are handed back", self._frontend.num_requests)
            self._rank.send(requests.Drain(0.0))
            await asyncio.wait((self._rank.exit_code,), timeout=DRAIN_MARGIN_SECONDS)
        insisted.cancel()
        if self._rank.exit_code.done():
            code = self._rank.exit_code.result()
            return 0 if code == 0 and self._failed is None else self._rank_died(code)
        _logger.error("stopped with %d requests unfinished", self._frontend.num_requests)
        return 1

    def _rank_died(self, code: int) -> int:
        assert self._rank is not None
        if self._failed is not None:
            _logger.error("rank 0 failed: %s", self._failed.message)
            return self._failed.exit_code or 1
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        last_words = self._rank.last_words()
        _logger.error("rank 0 ended %s%s", how, f"; it said last:\n{last_words}" if last_words else "")
        return 1

    # ---- the rank's messages --------------------------------------------------------------------------------------

    def _send(self, message: object) -> None:
        if self._rank is not None:
            self._rank.send(message)

    def _receive(self, messages: list[Any]) -> None:
        self._heard = time.monotonic()
        for message in messages:
            self._handlers[type(message)](message)

    def _dispatch_table(self) -> dict[type, Callable[[Any], None]]:
        table: dict[type, Callable[[Any], None]] = {
            StartupProgress: self._progressed,
            RankReady: self._became_ready,
            RankFailed: self._rank_failed,
            Stats: self._frontend.stats,
            StepEnded: self._frontend.step_ended,
            requests.Tokens: self._frontend.tokens,
            requests.Ended: self._frontend.ended,
        }
        if self._handoff_client is not None:
            table |= {
                handoff.OpenStream: self._handoff_client.open,
                handoff.SendRelease: self._handoff_client.release,
                handoff.DropStream: self._handoff_client.drop,
            }
        if self._handoff_server is not None:
            respond = self._handoff_server.respond
            sends = (handoff.SendAccepted, handoff.SendAnnounce, handoff.SendFirstToken, handoff.SendComplete)
            table |= dict.fromkeys(sends, respond) | {handoff.EndStream: self._handoff_server.end}
        return table

    def _not_ready(self) -> str:
        state = self._frontend.info.state
        return {"ready": "", "starting": f"starting: {self._doing}"}.get(state, state)

    def _fault(self) -> str:
        """A rank that has started reports every few seconds, whether or not it has work."""
        silent = time.monotonic() - self._heard
        if self._frontend.info.state == "starting" or silent < SILENT_SECONDS:
            return ""
        return f"the event loop of rank 0 has not reported for {silent:.0f} s"

    def _progressed(self, progress: StartupProgress) -> None:
        self._doing = progress.message
        if self._on_progress is not None:
            self._on_progress(progress.message)

    def _rank_failed(self, failed: RankFailed) -> None:
        self._failed = failed

    def _became_ready(self, ready: RankReady) -> None:
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
        _log_ready(self._servers.address, ready)
        self._serving = asyncio.create_task(self._servers.set_ready())
        self._export_metrics(ready)
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
        }
        register_worker(
            self._registry,
            lambda: self._frontend.load,
            self._vitals,
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
            loop_silent_seconds=time.monotonic() - self._heard,
            frontend_lag_seconds=self._health.loop_lag_seconds,
            sessions=self._frontend.num_sessions,
            drain_seconds=self._drain_clock.seconds(),
            drain_limit_seconds=self._drain_clock.limit_seconds(),
        )

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
        "%s serves at %s: loop %s, operators %s, %d KV tokens, prompts up to %d tokens",
        ready.model,
        address,
        ready.loop,
        ready.operators,
        ready.max_total_num_tokens,
        ready.max_req_input_len,
    )
    if ready.role == "unified":
        return
    names = [endpoint.transport for endpoint in ready.endpoints] or list(ready.imports)
    reasons = "; ".join(ready.transport_notes)
    _logger.info("KV transport: %s%s", ", ".join(names), f" ({reasons})" if reasons else "")

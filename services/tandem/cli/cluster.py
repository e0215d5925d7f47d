"""A whole Tandem on this machine: gateway and workers as child processes on loopback."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.cli.launch import Child, Show, all_ready, stop_all
from tandem.config import LoopName, TransportChoice
from tandem.config_load import PROGRAM_SECTIONS, Program, load
from tandem.errors import ConfigError

SERVING_SECONDS = 30.0  # for the gateway to meet its workers
_POOL_FRACTION = 0.5  # of the free memory, for all pools together


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What to start. `settings` are section.field=value for every program that has the section."""

    model: str = "demo"
    num_prefill: int = 1
    num_decode: int = 1
    num_unified: int = 0
    transport: TransportChoice = "auto"
    prefill_loop: LoopName = "auto"
    decode_loop: LoopName = "auto"
    port: int = 50051
    settings: tuple[tuple[str, str], ...] = ()
    config_file: str = ""

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode + self.num_unified


@dataclass(slots=True)
class Cluster:
    """The children and what their ready lines said. `stop` ends every one of them."""

    shape: Shape
    show: Show
    verbose: bool = False
    children: list[Child] = field(default_factory=list)
    workers: list[dict[str, Any]] = field(default_factory=list)
    gateway_address: str = ""

    async def start(self) -> None:
        """Start the workers side by side, then the gateway; raises ChildDied with which one ended, and why.

        Raises ConfigError for a gateway with TLS, whose authorities nothing here knows.
        """
        shape = self.shape
        gateway_config = load("gateway", [*self._own_settings("gateway"), "--gateway.decode=later:1"], os.environ)
        if gateway_config.tls.certificate_file:
            raise ConfigError("tls.certificate_file: this asks its gateway in plaintext; start `tandem gateway` alone")
        programs: list[tuple[Program, int]] = [
            ("prefill", shape.num_prefill),
            ("decode", shape.num_decode),
            ("unified", shape.num_unified),
        ]
        for program, count in programs:
            for index in range(count):
                await self._start(f"{program}-{index}", program, self._worker_flags(program))
        self.workers = await all_ready(self.children)
        gateway = await self._start("gateway", "gateway", self._gateway_flags())
        self.gateway_address = str((await gateway.ready)["address"])
        from tandem.cli.health import wait_serving  # grpc: after the last fork

        num_decode = shape.num_decode + shape.num_unified
        await wait_serving(self.gateway_address, shape.num_prefill, num_decode, SERVING_SECONDS)

    async def stop(self) -> None:
        """End every child."""
        await stop_all(self.children)

    def addresses(self, *programs: Program) -> list[str]:
        """Return the addresses of the workers of these kinds."""
        return [str(worker["address"]) for worker in self.workers if worker["program"] in programs]

    async def _start(self, name: str, program: Program, flags: Sequence[str]) -> Child:
        child = Child(name, self.show, self.verbose)
        self.children.append(child)
        await child.start(program, [*flags, *self._own_settings(program)])
        return child

    def _worker_flags(self, program: Program) -> list[str]:
        shape = self.shape
        threads = max(1, len(os.sched_getaffinity(0)) // shape.num_workers)
        flags = [
            *("--model.path", shape.model),
            *("--model.threads", str(threads)),
            *("--server.drain-seconds", "2"),
            *("--scheduler.loop", shape.prefill_loop if program == "prefill" else shape.decode_loop),
            *("--cache.memory-fraction", f"{max(0.01, _POOL_FRACTION / shape.num_workers):.3f}"),
        ]
        return flags if program == "unified" else [*flags, "--transfer.transport", shape.transport]

    def _gateway_flags(self) -> list[str]:
        return [
            *("--model.path", self.shape.model),
            *("--server.port", str(self.shape.port)),
            *("--server.drain-seconds", "2"),
            *("--gateway.prefill", ",".join(self.addresses("prefill"))),
            *("--gateway.decode", ",".join(self.addresses("decode", "unified"))),
        ]

    def _own_settings(self, program: Program) -> list[str]:
        flags = ["--config", self.shape.config_file] if self.shape.config_file else []
        for key, value in self.shape.settings:
            if key.partition(".")[0] in PROGRAM_SECTIONS[program]:
                flags.append(f"--{key.replace('_', '-')}={value}")
        return flags


async def interrupted_or(awaitable: asyncio.Future[Any], stop: asyncio.Event) -> bool:
    """Wait for either; whether it was the stop."""
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((awaitable, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    return stop.is_set()

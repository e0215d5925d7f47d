"""The gateway program. Not here: what it is made of (`server`), reading the configuration (`tandem.cli`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

import uvloop

from tandem.collector import keep_what_is_here
from tandem.config import Config, ServerConfig
from tandem.gateway.server import Gateway
from tandem.telemetry.logging import set_up

_logger = logging.getLogger(__name__)


async def serve(config: Config, ready: Callable[[str, int | None], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return 0.

    `ready(address, metrics_port)` is called once calls are answered. Raises ConfigError before anything is served.
    A second signal cuts the drain short.
    """
    stopping = asyncio.Event()
    hurrying = asyncio.Event()

    def signalled() -> None:
        (hurrying if stopping.is_set() else stopping).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    gateway = await Gateway.create(config)
    address = await gateway.start()
    _logger.info("gateway serves", extra={"fields": {"address": address, "metrics_port": gateway.metrics_port}})
    keep_what_is_here()
    if ready is not None:
        ready(address, gateway.metrics_port)
    await stopping.wait()
    _logger.info("gateway drains", extra={"fields": {"inflight": gateway.admission.inflight}})
    drain = asyncio.create_task(_drain(gateway, config.server, hurrying))
    hurry = asyncio.create_task(hurrying.wait())
    await asyncio.wait((drain, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        await gateway.hurry()
    hurry.cancel()
    await drain
    return 0


async def _drain(gateway: Gateway, config: ServerConfig, hurrying: asyncio.Event) -> None:
    """Be not ready at once, take what still comes for a while, then finish what runs."""
    await gateway.drain()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(hurrying.wait(), config.drain_delay_seconds)
    await gateway.stop(0 if hurrying.is_set() else config.drain_seconds)


def main(config: Config) -> int:
    """Run the program: logging, uvloop, `serve`."""
    set_up(config.server.log_level, config.server.log_format, program="gateway")
    return uvloop.run(serve(config))

"""`tandem gateway|prefill|decode|unified`: one program alone, in this process.

Each prints exactly one line on stdout, the ready line: a JSON object for whoever started it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.cli.config_help import help_text
from tandem.config import Config
from tandem.config_load import Program, load, to_toml

PARENT_VARIABLE = "TANDEM_PARENT_PID"  # set by `tandem up`: end when that process does
_logger = logging.getLogger(__name__)


def run(program: Program, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a program to its end and return the exit code; raises ConfigError with every fault."""
    if "--help" in argv or "-h" in argv:
        print(help_text(program))
        return 0
    if "--print-config" in argv:
        words = [word for word in argv if word != "--print-config"]
        print(to_toml(load(program, words, environ), program))
        return 0
    parent = environ.get(PARENT_VARIABLE, "")
    if parent.isdigit():
        from tandem.worker.parent_death import die_with

        die_with(int(parent), signal.SIGTERM)
    config = load(program, argv, environ)
    from tandem.telemetry.logging import set_up

    set_up(config.server.log_level, config.server.log_format, program=program)
    return _serve(program, config)


def _serve(program: Program, config: Config) -> int:
    import uvloop

    if program == "gateway":
        from tandem.gateway.main import serve as serve_gateway

        def gateway_ready(address: str, metrics_port: int | None) -> None:
            _print_ready({"program": "gateway", "address": address, "metrics_port": metrics_port})

        return uvloop.run(serve_gateway(config, gateway_ready))
    if config.parallel.rank:
        from tandem.worker.remote_follower import follow

        def follower_ready(ready: Any) -> None:
            _print_ready({"program": program, "rank": config.parallel.rank, **dataclasses.asdict(ready)})

        return follow(program, config, follower_ready)
    from tandem.worker.main import WorkerReady, serve

    def ready(worker: WorkerReady) -> None:
        _print_ready(ready_line(program, worker))

    def progress(message: str) -> None:
        _logger.info(message, extra={"fields": {"progress": True}})

    return uvloop.run(serve(program, config, ready, progress))


def ready_line(program: Program, worker: Any) -> dict[str, Any]:
    """Return what a worker says about itself when it serves."""
    rank = dataclasses.asdict(worker.rank)
    endpoints = rank.pop("endpoints")
    imports = rank.pop("imports")
    return {
        "program": program,
        "address": worker.address,
        "instance_id": worker.instance_id.hex(),
        "metrics_port": worker.metrics_port,
        "transports": [endpoint["transport"] for endpoint in endpoints] if program == "prefill" else list(imports),
        **rank,
    }


def _print_ready(line: dict[str, Any]) -> None:
    print(json.dumps({"event": "ready", "pid": os.getpid(), **line}), flush=True)
    sys.stdout.flush()

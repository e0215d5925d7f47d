"""The transfer processes of a worker's ranks, started: rank 0's own, the other ranks' through their links."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.config import Config
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.transfer import TransferReady
from tandem.engine.start import Engine
from tandem.errors import TandemError
from tandem.transfer.process import TransferProcess
from tandem.worker.messages import StartRank
from tandem.worker.transfer_group import RankLink, TransferGroup
from tandem.worker.transfer_link import TransferLink

START_SECONDS = 60.0  # for every rank's first transfer process to pass its self-test


@dataclass(frozen=True, slots=True)
class Transfer:
    """The transfer side of a worker; both None for a role that hands nothing over."""

    group: TransferGroup | None = None
    ready: TransferReady | None = None


def own_link(config: Config, worker_host: str, engine: Engine) -> TransferLink:
    """Return the link to this rank's own transfer process; the first `advance` starts it."""

    def spawn() -> TransferProcess:
        return TransferProcess.spawn(
            config.transfer, config.handoff, engine.memory, engine.layout, worker_host, config.tls
        )

    return TransferLink(spawn, time.monotonic, engine.device.adopt)


def start_transfer(start: StartRank, engine: Engine, others: Sequence[RankLink] = ()) -> Transfer:
    """Wait until the process of every rank is ready; `others` lead to those of ranks 1 to n.

    Raises TandemError if that takes too long, or if the ranks have no transport in common.
    """
    parallel = start.config.parallel
    model = replace(engine.layout, num_layers=engine.spec.num_layers, num_kv_heads=engine.spec.num_kv_heads)
    sharding = Sharding(parallel.tensor_size, parallel.pipeline_size)
    group = TransferGroup([own_link(start.config, start.worker_host, engine), *others], model, sharding)
    try:
        ready = _await_ready(group)
        if not (ready.endpoints if start.role == "prefill" else ready.imports):
            reasons = "; ".join(ready.notes) or "no reason was given"
            raise TandemError(f"no transport came up on every rank: {reasons}")
    except BaseException:
        group.stop()
        raise
    return Transfer(group, ready)


def _await_ready(group: TransferGroup) -> TransferReady:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        outcomes = group.advance()
        readable, _, _ = select.select(group.channels, [], [], 0.1)
        outcomes += group.receive() if readable else []
        for outcome in outcomes:
            if isinstance(outcome, TransferReady):
                return outcome
    raise TandemError(f"the transfer process was not ready within {START_SECONDS:g} s; its log says why")

"""Rank 0 of a worker: starts engine and transfer process, tells the frontend, and runs the event loop.

Runs in a process of its own, which shares a GIL neither with gRPC nor with KV bytes. It lives exactly as long as its
frontend's end of the pipe.
"""

from __future__ import annotations

import logging
import secrets
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from tandem.collector import keep_what_is_here
from tandem.config import ModelConfig
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.plans import Plan, Row, Sample
from tandem.core.messages.sampling import SamplingParams
from tandem.core.messages.transfer import TransferReady
from tandem.core.messages.worker import RankFailed, RankReady, StartupProgress
from tandem.core.roles import Loop, select_loop
from tandem.core.scheduler import TOKEN_BYTES, Scheduler
from tandem.core.settings import SchedulerSettings
from tandem.demo import MODEL_NAME
from tandem.engine.device import Device, GradientDevice
from tandem.engine.rank_device import replica_devices
from tandem.engine.start import Engine
from tandem.errors import ConfigError, TandemError
from tandem.ipc import Channel, ChannelClosed
from tandem.transfer.choice import check_transport
from tandem.worker.beside import ChoresAndTraining
from tandem.worker.chores import Chores
from tandem.worker.follower_process import Follower
from tandem.worker.leader import Ranks, start_ranks
from tandem.worker.loop import Beside, run
from tandem.worker.messages import StartRank
from tandem.worker.ports import RankPorts
from tandem.worker.training_desk import TrainingDesk
from tandem.worker.transfer_start import Transfer, start_transfer

WARM_UP_SECONDS = 300.0
FINISH_SECONDS = 5.0  # for the frontend to take the last messages
_WARM_UP_PLAN_ID = -1  # before every plan of the scheduler
_logger = logging.getLogger(__name__)


def serve(start: StartRank, frontend: Channel, followers: Sequence[Follower] = ()) -> int:
    """Run a rank to its end and return the process's exit code; faults go to the frontend as RankFailed.

    `followers` are the worker's other ranks, whose processes start meanwhile.
    """
    try:
        _serve(start, frontend, followers)
    except ChannelClosed:
        return 0  # the frontend is gone: nobody is left to tell
    except ConfigError as error:
        return _fail(frontend, RankFailed(error.message, exit_code=2))
    except TandemError as error:
        return _fail(frontend, RankFailed(error.message))
    except Exception as error:
        _logger.exception("rank 0 failed")
        return _fail(frontend, RankFailed(f"{type(error).__name__}: {error}"))
    return 0


def _serve(start: StartRank, frontend: Channel, followers: Sequence[Follower]) -> None:
    began = time.monotonic()
    progress = _progress_to(frontend)
    if start.role != "unified":
        check_transport(start.config.transfer)
    config = start.config if start.replica is None else replica_devices(start.config, start.replica)
    ranks = start_ranks(start.role, config, start.worker_host, followers, progress)
    engine, transfer = ranks.engine, Transfer()
    try:
        _warm_up(engine, progress)
        if start.role != "unified":
            progress("starting the transfer process")
            transfer = start_transfer(start, engine, ranks.links)
        loop = select_loop(start.role, start.config.scheduler.loop, start.config.parallel.pipeline_size).loop
        scheduler = Scheduler(_settings(start, engine, loop), lambda: secrets.token_bytes(TOKEN_BYTES))
        if transfer.ready is not None:
            scheduler.handle(transfer.ready, time.monotonic())
        ports = RankPorts(frontend, engine.device, transfer.group, time.monotonic)
        keep_what_is_here()
        ports.send(_ready(start, ranks, loop, scheduler.settings, transfer.ready, time.monotonic() - began))
        run(scheduler, engine.device, ports, time.monotonic, loop.depth, _beside(start, engine, ports))
        ports.finish(FINISH_SECONDS)
    finally:
        if transfer.group is not None:
            transfer.group.stop()
        engine.device.close()


def _beside(start: StartRank, engine: Engine, ports: RankPorts) -> Beside:
    """Chores; and with the admin service, trainings."""
    chores = Chores(ports.send, time.monotonic)
    if not start.config.server.admin:
        return chores
    device = cast(GradientDevice, engine.device)  # whoever has none of them refuses every training
    name = _model_name(start.config.model)
    desk = TrainingDesk(device, engine.lora, start.config, start.role, name, ports.send, time.monotonic)
    ports.take_aside(desk.handlers)
    return ChoresAndTraining(chores, desk)


def _progress_to(frontend: Channel) -> Callable[[str], None]:
    lock = threading.Lock()  # an engine that waits for other ranks starts in a thread of its own

    def progress(message: str) -> None:
        with lock:
            frontend.send(StartupProgress(message))
            frontend.flush()

    return progress


def _fail(frontend: Channel, failed: RankFailed) -> int:
    try:
        frontend.send(failed)
        deadline = time.monotonic() + FINISH_SECONDS
        while frontend.pending_bytes and time.monotonic() < deadline:
            select.select([], [frontend], [], FINISH_SECONDS)
            frontend.flush()
    except ChannelClosed:
        return failed.exit_code
    return failed.exit_code


def _warm_up(engine: Engine, progress: Callable[[str], None]) -> None:
    """Run a small plan through the device, as the loop will: what fails then fails before anybody is told to come."""
    progress("warming up")
    tokens = min(2, engine.layout.page_tokens)
    row = Row(
        request_id=0,
        slot=0,
        start=0,
        num_tokens=tokens,
        token_ids=(0,) * tokens,
        pages=(0,),
        sample=Sample(params=SamplingParams(temperature=0.0, max_tokens=1), output_index=0),
        zero_tail=True,
    )
    _resolve(engine.device, Plan(_WARM_UP_PLAN_ID, (row,)))


def _resolve(device: Device, plan: Plan) -> None:
    device.launch(plan)
    deadline = time.monotonic() + WARM_UP_SECONDS
    while not device.resolved():
        readable, _, _ = select.select([device], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise TandemError(f"the device did not finish a small plan within {WARM_UP_SECONDS:g} s")


def _settings(start: StartRank, engine: Engine, loop: Loop) -> SchedulerSettings:
    return SchedulerSettings(
        role=start.role,
        chain=loop.chain,
        stages=loop.stages,
        num_pages=engine.layout.num_pages,
        page_tokens=engine.layout.page_tokens,
        max_context_tokens=engine.spec.max_context_tokens,
        vocab_size=engine.spec.vocab_size,
        eos_token_ids=tuple(engine.spec.eos_token_ids),
        prefix_cache=start.config.cache.prefix_cache,
        scheduler=start.config.scheduler,
        handoff=start.config.handoff,
        fingerprint=engine.fingerprint,
        numerics=engine.numerics,
        instance_id=start.instance_id,
        sharding=Sharding(start.config.parallel.tensor_size, start.config.parallel.pipeline_size),
        num_layers=engine.spec.num_layers,
        num_kv_heads=engine.spec.num_kv_heads,
        adapters=engine.lora.adapters,
    )


def _ready(
    start: StartRank,
    ranks: Ranks,
    loop: Loop,
    settings: SchedulerSettings,
    transfer: TransferReady | None,
    seconds: float,
) -> RankReady:
    engine = ranks.engine
    return RankReady(
        role=start.role,
        loop=loop.name,
        model=_model_name(start.config.model),
        max_total_num_tokens=settings.max_total_num_tokens,
        max_req_input_len=settings.max_req_input_len,
        max_context_tokens=settings.max_context_tokens,
        max_running_requests=start.config.scheduler.max_running_requests,
        page_tokens=settings.page_tokens,
        num_pages=settings.num_pages,
        page_bytes=ranks.page_bytes,
        vocab_size=settings.vocab_size,
        eos_token_ids=settings.eos_token_ids,
        fingerprint=engine.fingerprint,
        numerics=engine.numerics,
        dtype=engine.layout.dtype,
        operators=engine.operators,
        weight_bytes=ranks.weight_bytes,
        pool_pages=ranks.pool_pages,
        endpoints=transfer.endpoints if transfer is not None and start.role == "prefill" else (),
        imports=transfer.imports if transfer is not None and start.role == "decode" else (),
        transport_notes=transfer.notes if transfer is not None else (),
        startup_seconds=seconds,
        adapters=engine.lora.adapters,
    )


def _model_name(model: ModelConfig) -> str:
    """The name that clients use, as the gateway has it."""
    if model.served_name:
        return model.served_name
    return MODEL_NAME if model.path == "demo" else Path(model.path).name or model.path

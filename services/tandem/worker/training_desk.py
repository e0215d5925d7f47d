"""Rank 0's side of trainings: takes them in, and launches their pieces where the device has nothing else to do.

A piece is launched only when no plan is in flight and the scheduler has none to make, and only as often as
`lora.device_share` allows. Requests that come meanwhile wait for one piece at most (PIECE_SECONDS, or one layer).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config import Config, Role
from tandem.core.messages.training import (
    CancelTraining,
    LoadAdapter,
    StartTraining,
    TrainingEnded,
    TrainingExamples,
    TrainingOptions,
    TrainingOutcome,
    TrainingStarted,
    TrainingStep,
)
from tandem.core.messages.worker import AdapterInfo, AdaptersChanged
from tandem.core.scheduler import Scheduler
from tandem.core.training_pace import TrainingPace
from tandem.engine.device import GradientDevice, GradientsResolved, GradientWork
from tandem.engine.lora import training
from tandem.engine.lora.start import LoraEngine
from tandem.engine.lora.trainer import StepDone
from tandem.engine.lora.weights import TARGETS, LoraWeights, target_shapes
from tandem.errors import TandemError

PIECE_SECONDS = 0.02
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    job_id: int
    options: TrainingOptions
    run: training.TrainingRun
    num_steps: int = 0
    stepped_at: float = 0.0
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _InFlight:
    job_id: int
    job: _Job | None  # None: an adapter that is made ready
    is_piece: bool


class TrainingDesk:
    """At most one training at a time. `run` after every turn of the loop; `handlers` take the frontend's messages."""

    def __init__(
        self,
        device: GradientDevice,
        lora: LoraEngine,
        config: Config,
        role: Role,
        model: str,
        send: Callable[[object], None],
        clock: Callable[[], float],
    ) -> None:
        self._device = device
        self._lora = lora
        self._config = config.lora
        self._why_no_adapters = why_split(config)
        self._why_not = why_no_training(config, role, lora)
        self._model = model
        self._send = send
        self._clock = clock
        self._pace = TrainingPace(config.lora.device_share)
        self._adapters = {adapter.name: adapter for adapter in lora.adapters}
        self._examples: dict[int, list[tuple[str, str]]] = {}
        self._job: _Job | None = None
        self._in_flight: _InFlight | None = None
        self._loads: list[LoadAdapter] = []
        self._idle = False
        self.handlers: dict[type, Callable[[Any], None]] = {
            TrainingExamples: self._take_examples,
            StartTraining: self._start,
            CancelTraining: self._cancel,
            LoadAdapter: self._loads.append,
        }

    def next_due(self) -> float | None:
        """When `run` wants to be called again; while the device is busy, its results call anyway."""
        if self._in_flight is not None or not self._idle:
            return None
        return self._pace.due() if self._job is not None else None

    def run(self, scheduler: Scheduler, *, idle: bool, now: float) -> None:
        """Account what has ended, and launch what may be. `idle`: the device has no plan, and there is none to make."""
        self._idle = idle
        if self._in_flight is not None:
            for resolved in self._device.gradients_resolved():
                self._resolved(scheduler, resolved, now)
        if self._in_flight is not None:
            return
        if self._loads:
            self._load(self._loads.pop(0), scheduler.adapters_in_use())
        elif idle and self._job is not None and now >= self._pace.due():
            run = self._job.run
            self._launch(self._job.job_id, self._job, lambda: run.advance(PIECE_SECONDS), is_piece=True)

    # ---- the frontend's messages ----------------------------------------------------------------------------------

    def _take_examples(self, message: TrainingExamples) -> None:
        self._examples.setdefault(message.job_id, []).extend(message.examples)

    def _start(self, message: StartTraining) -> None:
        pairs, options = self._examples.pop(message.job_id, []), message.options
        refusal = self._refusal(message.job_id, options)
        if refusal is not None:
            self._send(refusal)
            return
        self._job = _Job(message.job_id, options, training.TrainingRun(self._lora, options, pairs))
        self._pace.begin(self._clock())
        _logger.info("training adapter %s: %d examples", options.adapter, len(pairs))

    def _refusal(self, job_id: int, options: TrainingOptions) -> TrainingEnded | None:
        if self._why_not:
            return TrainingEnded(job_id, TrainingOutcome.REFUSED, self._why_not)
        if self._job is not None:
            return TrainingEnded(job_id, TrainingOutcome.BUSY, "another training is under way on this worker")
        unknown = sorted(set(options.targets) - TARGETS.keys())
        if unknown:
            message = f"targets {', '.join(unknown)}: not linears of a layer; these are: {', '.join(TARGETS)}"
            return TrainingEnded(job_id, TrainingOutcome.REFUSED, message, "targets")
        return self._full(job_id, options.adapter)

    def _full(self, job_id: int, name: str) -> TrainingEnded | None:
        most = self._config.max_adapters
        if name in self._adapters or len(self._adapters) < most:
            return None
        message = f"{most} adapters are served already, which is lora.max_adapters"
        return TrainingEnded(job_id, TrainingOutcome.REFUSED, message, "adapter")

    def _cancel(self, message: CancelTraining) -> None:
        self._examples.pop(message.job_id, None)
        job = self._job
        if job is not None and job.job_id == message.job_id:
            job.cancelled = True
            if self._in_flight is None:
                self._end(job, TrainingOutcome.CANCELLED, "the training was cancelled")

    # ---- launches -------------------------------------------------------------------------------------------------

    def _launch(self, job_id: int, job: _Job | None, work: Callable[[], object], *, is_piece: bool = False) -> None:
        self._in_flight = _InFlight(job_id, job, is_piece)
        self._device.launch_gradients(GradientWork(work))

    def _load(self, message: LoadAdapter, in_use: frozenset[str]) -> None:
        lora, name, folder = self._lora, message.adapter, self._config.folder
        refusal = self._full(message.job_id, name)
        if self._why_no_adapters or not folder:
            why = self._why_no_adapters or "this worker has no lora.folder"
            refusal = TrainingEnded(message.job_id, TrainingOutcome.REFUSED, why)
        if refusal is not None:
            self._send(refusal)
            return
        self._launch(
            message.job_id,
            None,
            lambda: training.serve(lora, name, training.read(lora, name, Path(folder)), in_use),
        )

    def _resolved(self, scheduler: Scheduler, resolved: GradientsResolved, now: float) -> None:
        done, self._in_flight = self._in_flight, None
        assert done is not None, "a launch of somebody else"
        if done.is_piece:
            self._pace.resolved(resolved.device_seconds, now)
        job = done.job
        if resolved.error is not None:
            self._failed(done, resolved.error)
        elif isinstance(resolved.value, AdapterInfo):
            self._serve(scheduler, resolved.value, done, now)
        elif job is not None and job.cancelled:
            self._end(job, TrainingOutcome.CANCELLED, "the training was cancelled")
        elif job is not None:
            self._progressed(scheduler, job, resolved.value, now)

    def _progressed(self, scheduler: Scheduler, job: _Job, value: object, now: float) -> None:
        match value:
            case training.Prepared():
                job.num_steps, job.stepped_at = value.num_steps, now
                self._send(TrainingStarted(job.job_id, value.num_examples, value.num_tokens, value.num_steps))
            case StepDone():
                seconds, job.stepped_at = now - job.stepped_at, now
                self._send(
                    TrainingStep(
                        job_id=job.job_id,
                        step=value.step,
                        num_steps=job.num_steps,
                        loss=value.loss,
                        tokens_per_second=value.num_tokens / max(seconds, 1e-9),
                        device_share=self._pace.share(now),
                    )
                )
            case LoraWeights():
                self._save(job, value, scheduler.adapters_in_use())

    def _save(self, job: _Job, weights: LoraWeights, in_use: frozenset[str]) -> None:
        lora, name, folder, model = self._lora, job.options.adapter, Path(self._config.folder), self._model

        def work() -> AdapterInfo:
            training.save(weights, name, folder, model)
            return training.serve(lora, name, weights, in_use)

        self._launch(job.job_id, job, work)

    def _serve(self, scheduler: Scheduler, adapter: AdapterInfo, done: _InFlight, now: float) -> None:
        """The adapter is there: requests may name it from now on."""
        self._adapters[adapter.name] = adapter
        changed = AdaptersChanged(tuple(self._adapters.values()))
        scheduler.handle(changed, now)
        self._send(changed)
        _logger.info("adapter %s is served: %s", adapter.name, adapter.digest[:12])
        self._send(TrainingEnded(done.job_id, TrainingOutcome.DONE, adapter=adapter))
        if done.job is not None:
            self._job = None

    def _failed(self, done: _InFlight, error: Exception) -> None:
        refused = isinstance(error, TandemError)
        outcome = TrainingOutcome.REFUSED if refused else TrainingOutcome.FAILED
        message = error.message if isinstance(error, TandemError) else f"{type(error).__name__}: {error}"
        if not refused:
            _logger.error("a training failed: %s", type(error).__name__, exc_info=error)
        if done.job is not None:
            self._end(done.job, outcome, message, getattr(error, "field", ""))
        else:
            self._send(TrainingEnded(done.job_id, outcome, message, getattr(error, "field", "")))

    def _end(self, job: _Job, outcome: TrainingOutcome, message: str, field_name: str = "") -> None:
        self._job = None
        self._send(TrainingEnded(job.job_id, outcome, message, field_name))


def why_no_training(config: Config, role: Role, lora: LoraEngine) -> str:
    """Say why this worker never trains; empty: it does."""
    if role == "decode":
        return "a decode worker does not train: its device is never idle for long; ask a prefill or unified worker"
    if split := why_split(config):
        return split
    missing = [target for target in TARGETS if (0, target) not in target_shapes(lora.spec)]
    if missing:
        return f"no training of {lora.spec.architecture}: a layer has experts instead of {', '.join(missing)}"
    if not config.lora.folder:
        return "this worker has no lora.folder to save adapters in"
    return ""


def why_split(config: Config) -> str:
    """Say why this worker's adapters cannot change while it runs; empty: they can."""
    for name in ("tensor_size", "pipeline_size", "expert_size", "data_size"):
        size = getattr(config.parallel, name)
        if size > 1:
            return f"not with parallel.{name} {size}: trainings and new adapters need the whole model in one process"
    return ""

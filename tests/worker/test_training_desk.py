"""Rank 0's side of trainings: when a piece is launched, what ends one, what is refused. The run itself is played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tandem.config import Config, LoraConfig, ParallelConfig, Role
from tandem.core.messages.training import (
    CancelTraining,
    StartTraining,
    TrainingEnded,
    TrainingExamples,
    TrainingOptions,
    TrainingOutcome,
    TrainingStarted,
    TrainingStep,
)
from tandem.core.scheduler import Scheduler
from tandem.engine.device import GradientDevice, GradientsResolved, GradientWork
from tandem.engine.lora import training
from tandem.engine.lora.start import LoraEngine
from tandem.engine.lora.trainer import StepDone
from tandem.engine.models.spec import read_spec
from tandem.worker.training_desk import TrainingDesk
from tests.core.rig import Rig
from tests.engine.checkpoints import VARIANTS, write_checkpoint

OPTIONS = TrainingOptions(adapter="adds")


class PlayedDevice:
    """Gradient launches end when the test says so."""

    def __init__(self) -> None:
        self.launched: list[GradientWork] = []
        self.done: list[GradientsResolved] = []

    def launch_gradients(self, work: GradientWork) -> None:
        self.launched.append(work)

    def gradients_resolved(self) -> list[GradientsResolved]:
        done, self.done = self.done, []
        return done


class Bench:
    def __init__(self, lora: LoraEngine, role: Role = "unified", **parallel: Any) -> None:
        config = Config(
            lora=LoraConfig(folder="/adapters", device_share=0.25), parallel=replace(ParallelConfig(), **parallel)
        )
        self.device = PlayedDevice()
        self.heard: list[Any] = []
        self.now = 10.0
        self.scheduler: Scheduler = Rig().scheduler
        self.desk = TrainingDesk(
            cast(GradientDevice, self.device), lora, config, role, "m", self.heard.append, lambda: self.now
        )

    def tell(self, message: object) -> None:
        self.desk.handlers[type(message)](message)

    def start(self, job_id: int = 1, options: TrainingOptions = OPTIONS) -> None:
        self.tell(TrainingExamples(job_id, (("", "x"),)))
        self.tell(StartTraining(job_id, options))

    def turn(self, *, idle: bool = True) -> int:
        """One turn of the loop; returns how many pieces are under way."""
        self.desk.run(self.scheduler, idle=idle, now=self.now)
        return len(self.device.launched)

    def resolve(self, value: object = None, error: Exception | None = None, seconds: float = 0.1) -> None:
        self.device.launched.pop(0)
        self.device.done.append(GradientsResolved(value, error, seconds))
        self.turn()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> LoraEngine:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(VARIANTS[0], folder)
    unused: Any = None
    return LoraEngine(
        store=unused,
        adapters=(),
        decoder=unused,
        spec=read_spec(folder),
        folder=Path(folder),
        device=torch.device("cpu"),
    )


def test_pieces_wait_for_plans_and_for_their_share(lora: LoraEngine) -> None:
    bench = Bench(lora)
    assert bench.desk.next_due() is None
    bench.start()
    assert bench.turn(idle=False) == 0 and bench.desk.next_due() is None, "no busy waiting for a device at work"
    assert bench.turn() == 1
    assert bench.turn() == 1 and bench.desk.next_due() is None
    bench.resolve(training.Prepared(1, 5, 3), seconds=0.1)
    assert bench.heard[-1] == TrainingStarted(1, 1, 5, 3)
    assert bench.device.launched == [] and bench.desk.next_due() == pytest.approx(10.3)
    bench.now = 10.2
    assert bench.turn() == 0
    bench.now = 10.4
    assert bench.turn() == 1
    bench.now = 10.5
    bench.resolve(StepDone(1, 2.5, 10))
    step = bench.heard[-1]
    assert isinstance(step, TrainingStep)
    assert (step.step, step.num_steps, step.loss) == (1, 3, 2.5)
    assert step.tokens_per_second == pytest.approx(20.0)
    assert step.device_share == pytest.approx(0.4)


@pytest.mark.parametrize("under_way", [False, True])
def test_a_cancelled_training_ends_once_nothing_of_it_runs(lora: LoraEngine, under_way: bool) -> None:
    bench = Bench(lora)
    bench.start()
    if under_way:
        bench.turn()
    bench.tell(CancelTraining(1))
    if under_way:
        assert bench.heard == []
        bench.resolve()
    assert bench.heard == [TrainingEnded(1, TrainingOutcome.CANCELLED, "the training was cancelled")]
    bench.start(2)
    bench.now += 10
    assert bench.turn() == 1, "the next one may begin"


def test_a_failure_is_told_and_the_next_may_begin(lora: LoraEngine) -> None:
    bench = Bench(lora)
    bench.start()
    bench.start(2)
    assert bench.heard.pop().outcome is TrainingOutcome.BUSY
    bench.turn()
    bench.resolve(error=MemoryError("none is left"))
    assert bench.heard.pop() == TrainingEnded(1, TrainingOutcome.FAILED, "MemoryError: none is left")
    bench.start(3)
    assert bench.heard == []


REFUSALS: list[tuple[Callable[[LoraEngine], Bench], str]] = [
    (lambda lora: Bench(lora, "decode"), "a decode worker does not train"),
    (lambda lora: Bench(lora, pipeline_size=2), "not with parallel.pipeline_size 2"),
    (lambda lora: Bench(lora, tensor_size=2), "not with parallel.tensor_size 2"),
    (lambda lora: Bench(lora, data_size=3), "not with parallel.data_size 3"),
]


@pytest.mark.parametrize(("bench_of", "told"), REFUSALS)
def test_who_never_trains_says_so(lora: LoraEngine, bench_of: Callable[[LoraEngine], Bench], told: str) -> None:
    bench = bench_of(lora)
    bench.start()
    (end,) = bench.heard
    assert end.outcome is TrainingOutcome.REFUSED and told in end.message
    assert bench.turn() == 0


def test_unknown_targets_are_named(lora: LoraEngine) -> None:
    bench = Bench(lora)
    bench.start(options=TrainingOptions(adapter="adds", targets=("q_proj", "lm_head")))
    assert "targets lm_head: not linears of a layer" in bench.heard[0].message

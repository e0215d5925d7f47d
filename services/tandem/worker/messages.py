"""The pipe between a worker's frontend and its rank 0: what it carries, in which direction.

Events of the scheduler come from the frontend as they are, its effects go back as they are. The order of the classes
is the wire form of a pipe that lives and dies with one worker, so it may change at will.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import Config, Role
from tandem.core.messages import handoff, requests, training
from tandem.core.messages.worker import AdaptersChanged, RankFailed, RankReady, StartupProgress, Stats
from tandem.ipc import Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRank:
    """The first message to a rank: who it is. `worker_host` is where peers reach this worker.

    `instance_id` names its scheduler to prefill workers; `replica` is its index where the worker has several.
    """

    role: Role
    config: Config
    instance_id: bytes
    worker_host: str
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class StepEnded:
    """Everything that one turn of the event loop says to clients has been sent. `mono_ns`: the rank's clock."""

    step: int
    mono_ns: int


TO_RANK = Schema(
    (
        StartRank,
        requests.Submit,
        requests.Cancel,
        requests.Drain,
        handoff.StreamAccepted,
        handoff.StreamAnnounced,
        handoff.StreamFirstToken,
        handoff.StreamCompleted,
        handoff.StreamClosed,
        handoff.OpenReceived,
        handoff.ReleaseReceived,
        handoff.StreamLost,
        training.TrainingExamples,
        training.StartTraining,
        training.CancelTraining,
        training.LoadAdapter,
    )
)
TO_FRONTEND = Schema(
    (
        StartupProgress,
        RankReady,
        RankFailed,
        Stats,
        StepEnded,
        AdaptersChanged,
        requests.Tokens,
        requests.Ended,
        handoff.OpenStream,
        handoff.SendRelease,
        handoff.DropStream,
        handoff.SendAccepted,
        handoff.SendAnnounce,
        handoff.SendFirstToken,
        handoff.SendComplete,
        handoff.EndStream,
        training.TrainingStarted,
        training.TrainingStep,
        training.TrainingEnded,
    )
)

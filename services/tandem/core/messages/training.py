"""The training of an adapter, as a worker's frontend and its rank 0 speak of it. Texts are in no other message."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tandem.core.messages.worker import AdapterInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """`targets` are names of linears, as PEFT has them. One step takes `batch_size` examples."""

    adapter: str
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ()
    learning_rate: float = 2e-4
    epochs: int = 1
    batch_size: int = 4
    max_sequence_tokens: int = 1024
    seed: int = 0


# ---- frontend -> rank ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingExamples:
    """Some of a training's examples, (prompt, completion) each. They come before StartTraining."""

    job_id: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class StartTraining:
    """All examples are there. Answered by TrainingStarted and TrainingSteps, and by one TrainingEnded in any case."""

    job_id: int
    options: TrainingOptions


@dataclass(frozen=True, slots=True)
class CancelTraining:
    """End a training, or forget its examples. Unknown and ended jobs are ignored."""

    job_id: int


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Serve an adapter of the worker's folder. Answered by one TrainingEnded."""

    job_id: int
    adapter: str


# ---- rank -> frontend ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    job_id: int
    num_examples: int  # with something to learn
    num_tokens: int  # of one epoch
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """`loss`: mean over the step's target tokens. `device_share`: of the time since the training started."""

    job_id: int
    step: int  # from 1
    num_steps: int
    loss: float
    tokens_per_second: float
    device_share: float


class TrainingOutcome(Enum):
    DONE = "done"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # it cannot be done here, or not with these options or examples
    BUSY = "busy"  # another one is under way
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TrainingEnded:
    """The last message about a job. `adapter` is served from now on if the outcome is DONE."""

    job_id: int
    outcome: TrainingOutcome
    message: str = ""
    field_name: str = ""  # REFUSED: the option at fault
    adapter: AdapterInfo | None = None

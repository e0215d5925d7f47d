"""A training from texts to an adapter that is saved and served, in pieces that run as gradient launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tandem.core.messages.training import TrainingOptions
from tandem.core.messages.worker import AdapterInfo
from tandem.engine.host import available_memory_bytes
from tandem.engine.lora.examples import Example, ExampleEncoder
from tandem.engine.lora.frozen import FrozenModel
from tandem.engine.lora.peft_folder import read_adapter, write_adapter
from tandem.engine.lora.start import LoraEngine
from tandem.engine.lora.trainer import LoraTrainer, StepDone
from tandem.engine.lora.weights import LoraWeights, target_shapes
from tandem.errors import ConfigError, InvalidRequest

_GRAPH_ACTIVATIONS = 12  # of [T, widest] float32 in one layer's graph, attention's scores apart
_ADAM_COPIES = 4  # a parameter, its gradient, and two averages


@dataclass(frozen=True, slots=True)
class Prepared:
    """The examples are tokenized. `num_tokens`: of one epoch."""

    num_examples: int
    num_tokens: int
    num_steps: int


Progress = Prepared | StepDone | LoraWeights  # the last one ends it


class TrainingRun:
    """One training. `advance` is called on the compute thread, under autograd; nothing else touches it meanwhile."""

    def __init__(self, lora: LoraEngine, options: TrainingOptions, pairs: Sequence[tuple[str, str]]) -> None:
        self._lora = lora
        self._options = options
        self._work = self._run(pairs)

    def advance(self, seconds: float) -> Progress | None:
        """Work for about so long, or until there is something to say. Raises InvalidRequest for what cannot be done."""
        until = time.perf_counter() + seconds
        while True:
            progress = next(self._work)
            if progress is not None or time.perf_counter() >= until:
                return progress

    def _run(self, pairs: Sequence[tuple[str, str]]) -> Generator[Progress | None, None, None]:
        lora, options = self._lora, self._options
        encoder = ExampleEncoder(
            lora.folder, lora.spec.eos_token_ids, lora.spec.vocab_size, options.max_sequence_tokens
        )
        examples: list[Example] = []
        for example in encoder.encode_all(pairs):
            if example is not None:
                examples.append(example)
            yield None
        if not examples:
            raise InvalidRequest("no example has anything to learn within max_sequence_tokens", field="examples")
        check_memory(lora, options, examples, available_memory_bytes)
        trainer = LoraTrainer(FrozenModel(lora.decoder, lora.device), lora.spec, options, examples)
        num_tokens = sum(len(example.token_ids) for example in examples)
        yield Prepared(len(examples), num_tokens, trainer.num_steps)
        try:
            while True:
                yield trainer.advance(0.0)
        except StopIteration:
            yield trainer.weights()


def check_memory(
    lora: LoraEngine, options: TrainingOptions, examples: Sequence[Example], free_bytes: Callable[[], int]
) -> None:
    """Raise InvalidRequest if a training would take more memory than is free: serving must not die of it."""
    spec = lora.spec
    shapes = target_shapes(spec)
    longest = max(len(example.token_ids) for example in examples)
    layer = sum(outputs * inputs for (number, _), (outputs, inputs) in shapes.items() if number == 0)
    chosen = [shape for (_, target), shape in shapes.items() if not options.targets or target in options.targets]
    widest = max(spec.intermediate_size, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
    floats = (
        2 * layer  # as read back, and in float32
        + spec.num_layers * longest * spec.hidden_size
        + _GRAPH_ACTIVATIONS * longest * widest
        + 3 * spec.num_heads * 256 * longest
        + _ADAM_COPIES * options.rank * sum(outputs + inputs for outputs, inputs in chosen)
        + spec.vocab_size * spec.hidden_size  # the head
        + 3 * (1 << 23)  # a block of logits
    )
    free = int(torch.cuda.mem_get_info(lora.device)[0]) if lora.device.type == "cuda" else free_bytes()
    if 4 * floats > free:
        raise InvalidRequest(
            f"training takes about {4 * floats / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free",
            field="max_sequence_tokens",
        )


def save(weights: LoraWeights, name: str, folder: Path, base_model: str) -> None:
    """Write a trained adapter below `folder`; raises OSError."""
    write_adapter(folder / name, weights, base_model)


def serve(lora: LoraEngine, name: str, weights: LoraWeights, in_use: frozenset[str]) -> AdapterInfo:
    """Prepare an adapter, and let go of those that nobody has a use for any more."""
    with torch.inference_mode():
        lora.store.keep(in_use)
        return AdapterInfo(name, lora.store.add(weights))


def read(lora: LoraEngine, name: str, folder: Path) -> LoraWeights:
    """Read an adapter below `folder`; raises InvalidRequest that says what is wrong with it."""
    try:
        return read_adapter(folder / name, lora.spec)
    except ConfigError as error:
        raise InvalidRequest(error.message.replace(str(folder), "lora.folder"), field="adapter") from error

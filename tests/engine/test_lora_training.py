"""Training against PEFT's own gradients, with every operator set; it learns, and the seed alone decides."""

from __future__ import annotations

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from tandem.core.messages.training import TrainingOptions
from tandem.engine.lora.examples import Example, ExampleEncoder
from tandem.engine.lora.frozen import FrozenModel
from tandem.engine.lora.peft_folder import write_adapter
from tandem.engine.lora.trainer import LoraTrainer, StepDone
from tandem.engine.start import Engine
from tandem.errors import InvalidRequest
from tests.engine.checkpoints import VARIANTS, VOCABULARY, Variant, write_checkpoint
from tests.engine.conftest import EngineStarter

CHOSEN = [variant for variant in VARIANTS if variant.name in ("llama_biased", "qwen2", "qwen3", "mistral")]
OPTIONS = TrainingOptions(adapter="made", rank=4, alpha=6.0, epochs=30, batch_size=2, learning_rate=5e-3, seed=3)


def examples(seed: int = 1) -> list[Example]:
    generator = np.random.default_rng(seed)
    return [
        Example(tuple(generator.integers(0, VOCABULARY, length).tolist()), first)
        for length, first in ((9, 1), (33, 20), (2, 1), (18, 17))
    ]


def trainer_of(engine: Engine, options: TrainingOptions = OPTIONS) -> LoraTrainer:
    lora = engine.lora
    return LoraTrainer(FrozenModel(lora.decoder, lora.device), lora.spec, options, examples())


def run(trainer: LoraTrainer) -> list[StepDone]:
    done: list[StepDone] = []
    try:
        while True:
            step = trainer.advance(0.0)
            if step is not None:
                done.append(step)
    except StopIteration:
        return done


def returned(work: Generator[Any, None, float]) -> float:
    try:
        while True:
            next(work)
    except StopIteration as ended:
        return float(ended.value)


def expected(model: Any, folder: Path, batch: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """PEFT's loss and gradients for the adapter in `folder`."""
    adapted: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True).eval()
    total = torch.zeros(())
    for example in batch:
        logits = adapted(input_ids=torch.tensor([example.token_ids[:-1]])).logits[0].float()
        targets = torch.tensor(example.token_ids[example.first_target :])
        logprobs = logits[example.first_target - 1 :].log_softmax(dim=-1)
        total = total - logprobs.gather(-1, targets[:, None]).sum()
    loss = total / sum(example.num_targets for example in batch)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize("variant", CHOSEN, ids=lambda variant: variant.name)
def test_gradients_are_those_of_peft(variant: Variant, ops: str, tmp_path: Path, start: EngineStarter) -> None:
    model = write_checkpoint(variant, tmp_path / "model")
    trainer = trainer_of(start(tmp_path / "model", ops=ops))
    for pairs in trainer._pairs:  # B is zero at the start of a training, and then A has no gradient
        for _, b in pairs.values():
            torch.nn.init.normal_(b, std=0.3, generator=torch.Generator().manual_seed(5))
    write_adapter(tmp_path / "adapter", trainer.weights(), "base")
    batch = examples()
    num_targets = sum(example.num_targets for example in batch)
    loss = sum(returned(trainer._learn(example, num_targets)) for example in batch) / num_targets
    expected_loss, gradients = expected(model, tmp_path / "adapter", batch)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert len(gradients) == 2 * 7 * len(trainer._pairs)
    for name, gradient in gradients.items():
        parts = name.split(".")
        a, b = trainer._pairs[int(parts[4])][parts[6]]
        own = (a if "lora_A" in name else b).grad
        assert own is not None
        assert (own - gradient).abs().max() <= 2e-4 * gradient.abs().max() + 1e-7, name


def test_it_learns_and_the_seed_decides(tmp_path: Path, start: EngineStarter) -> None:
    write_checkpoint(CHOSEN[0], tmp_path)
    engine = start(tmp_path)
    first = trainer_of(engine)
    steps = run(first)
    assert [step.step for step in steps] == list(range(1, first.num_steps + 1))
    assert sum(step.num_tokens for step in steps) == 30 * sum(len(example.token_ids) for example in examples())
    assert np.mean([step.loss for step in steps[-4:]]) < 0.5 * np.mean([step.loss for step in steps[:4]])
    again = trainer_of(engine)
    assert [step.loss for step in run(again)] == [step.loss for step in steps]
    assert again.weights().digest == first.weights().digest


def test_examples_are_cut_marked_and_ended(tmp_path: Path) -> None:
    from tandem.demo import model_path

    encoder = ExampleEncoder(model_path(), (0,), 1 << 20, 12)
    whole = encoder.encode("", "def f(x):")
    assert whole is not None and whole.first_target == 1 and whole.token_ids[-1] == 0
    pair = encoder.encode("def f(x):", " return x")
    assert pair is not None
    assert pair.token_ids[: pair.first_target] == whole.token_ids[:-1]
    cut = encoder.encode("", "x = 1\n" * 20)
    assert cut is not None and len(cut.token_ids) == 12
    assert encoder.encode("x = 1\n" * 20, "y") is None, "nothing of it is left to learn"
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json cannot be used"):
        ExampleEncoder(tmp_path, (), 10, 10)

"""Trains an adapter in short pieces: one layer forward or backward, a block of logits, an optimizer step.

A step of `batch_size` examples goes through the layers example by example. The forward pass keeps only each layer's
input; the backward pass computes the layer once more, with its graph, and drops it. So the memory is one layer's
weights and graph, one example's layer inputs, and the head. AdamW on A and B alone; the base model is never changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from tandem.core.messages.training import TrainingOptions
from tandem.engine.lora.examples import Example
from tandem.engine.lora.frozen import FrozenModel, Pair
from tandem.engine.lora.peft_folder import random_adapter
from tandem.engine.lora.weights import TARGETS, LoraMatrices, LoraShape, LoraWeights
from tandem.engine.models.spec import DecoderSpec

_LOGITS_ELEMENTS = 1 << 23  # of a block of target tokens
_HEAD_ELEMENTS = 1 << 22  # of the head, widened at a time
_GRADIENT_NORM_MAX = 1.0
_WARM_UP_STEPS = 10


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step. `loss`: mean over its target tokens; `num_tokens`: all that went through the layers."""

    step: int
    loss: float
    num_tokens: int


class LoraTrainer:
    """One training. Everything is drawn from the seed: the same examples and options give the same adapter."""

    def __init__(
        self, model: FrozenModel, spec: DecoderSpec, options: TrainingOptions, examples: Sequence[Example]
    ) -> None:
        self._model = model
        self._spec = spec
        self._options = options
        self._examples = examples
        self._shape = LoraShape(rank=options.rank, alpha=options.alpha, rslora=options.rslora)
        self._generator = torch.Generator().manual_seed(options.seed)
        start = random_adapter(spec, self._shape, options.targets or tuple(TARGETS), options.seed)
        self._device = model.device
        self._pairs: list[dict[str, Pair]] = [{} for _ in range(spec.num_layers)]
        for (layer, target), pair in start.matrices.items():
            a, b = (matrix.to(self._device).requires_grad_() for matrix in (pair.a, pair.b))
            self._pairs[layer][target] = (a, b)
        self._parameters = [matrix for pairs in self._pairs for pair in pairs.values() for matrix in pair]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=options.learning_rate, weight_decay=0.0)
        self._work = self._run()

    @property
    def num_steps(self) -> int:
        return self._options.epochs * math.ceil(len(self._examples) / self._options.batch_size)

    def advance(self, seconds: float) -> StepDone | None:
        """Work for about so long, or until a step is done. Raises StopIteration after the last step."""
        until = time.perf_counter() + seconds
        while True:
            done = next(self._work)
            if done is not None or time.perf_counter() >= until:
                return done

    def weights(self) -> LoraWeights:
        """The adapter as it is now, apart from what is trained on."""
        matrices = {
            (layer, target): LoraMatrices(a.detach().cpu().clone(), b.detach().cpu().clone())
            for layer, pairs in enumerate(self._pairs)
            for target, (a, b) in pairs.items()
        }
        return LoraWeights(self._shape, matrices)

    # ---- one after another; each `yield` lets others have the device -----------------------------------------------

    def _run(self) -> Generator[StepDone | None, None, None]:
        step, size = 0, self._options.batch_size
        for _ in range(self._options.epochs):
            order = torch.randperm(len(self._examples), generator=self._generator).tolist()
            for first in range(0, len(order), size):
                batch = [self._examples[number] for number in order[first : first + size]]
                num_targets = sum(example.num_targets for example in batch)
                total = 0.0
                for example in batch:
                    total += yield from self._learn(example, num_targets)
                step += 1
                self._update(step)
                yield StepDone(step, total / num_targets, sum(len(example.token_ids) for example in batch))

    def _learn(self, example: Example, num_targets: int) -> Generator[StepDone | None, None, float]:
        """Add one example's gradients; returns the sum of its losses."""
        token_ids = torch.tensor(example.token_ids, device=self._device)
        inputs = [self._model.embed(token_ids[:-1])]
        yield None
        for number in range(self._spec.num_layers):
            with torch.no_grad():
                inputs.append(self._layer(number, inputs[-1]))
            yield None
        hidden = inputs.pop().requires_grad_()
        normed = self._model.final_norm(hidden)
        gradient = torch.zeros_like(normed)
        loss = 0.0
        first = example.first_target - 1  # position t predicts token t + 1
        block = max(1, _LOGITS_ELEMENTS // self._spec.vocab_size)
        for start in range(first, len(token_ids) - 1, block):
            rows = slice(start, min(start + block, len(token_ids) - 1))
            targets = token_ids[rows.start + 1 : rows.stop + 1]
            loss += self._head(normed.detach()[rows], targets, gradient[rows], num_targets)
            yield None
        torch.autograd.backward(normed, gradient)
        flowing = hidden.grad
        for number in reversed(range(self._spec.num_layers)):
            start_of_layer = inputs.pop().requires_grad_()
            torch.autograd.backward(self._layer(number, start_of_layer), flowing)
            flowing = start_of_layer.grad
            yield None
        return loss

    def _layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        frozen = self._model.layer(number)
        return self._model.run_layer(frozen, hidden, self._pairs[number], self._shape.scale)

    def _head(self, normed: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor, num_targets: int) -> float:
        """Cross entropy of a block of positions: writes d(loss / num_targets) / d(normed), returns the summed loss."""
        head = self._model.head
        with torch.no_grad():
            blocks = torch.split(head, max(1, _HEAD_ELEMENTS // head.shape[1]))
            logits = torch.cat([normed @ block.float().t() for block in blocks], dim=-1)
            rows = torch.arange(len(targets), device=targets.device)
            log_probabilities = logits.log_softmax(dim=-1)
            loss = -float(log_probabilities[rows, targets].double().sum())
            slopes = log_probabilities.exp_()
            slopes[rows, targets] -= 1.0
            slopes /= num_targets
            gradient.zero_()
            for block, part in zip(blocks, torch.split(slopes, len(blocks[0]), dim=-1), strict=True):
                gradient += part @ block.float()
        return loss

    def _update(self, step: int) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, _GRADIENT_NORM_MAX)
        warm = min(_WARM_UP_STEPS, max(1, self.num_steps // 10))
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * min(1.0, step / warm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

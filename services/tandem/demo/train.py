"""Trains the demo model: `python -m tandem.demo.train`.

Everything comes from the interpreter that runs it, so it needs no network. The learning rate follows the budget
(time or tokens, whichever is nearer its end), and the checkpoint folder is usable from the first few minutes on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.demo import model_path
from tandem.demo.checkpoint import CONFIG, CONTEXT, Progress, write_tokenizer, write_weights
from tandem.demo.corpus import Document, collect, train_tokenizer

SHORT = 512  # most steps read short sequences, every LONG_EVERY-th the full context
LONG_EVERY = 8
BLOCKS = 1  # blocks of CONTEXT tokens in a step
MAX_PARAMETERS = 3_000_000
WARM_UP = 0.02  # share of the budget
FLOOR = 0.02  # share of the peak learning rate at the end
MATRIX_RATE = 4e-3  # peak learning rates: of the layers' matrices,
OTHER_RATE = 6e-3  # and of the embedding and the norms
AVERAGED = 100  # steps in the reported training loss
PROMPT = "import os\n\n\nclass Reader:\n    def __init__(self, path"


@dataclass
class Budget:
    """What a run may spend; `spent` is the share of it that is gone."""

    minutes: float
    max_tokens: int
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return (time.monotonic() - self.started) / 60

    @property
    def spent(self) -> float:
        by_time = self.elapsed / self.minutes if self.minutes else 0.0
        return min(1.0, max(by_time, self.tokens / self.max_tokens))

    def learning_rate(self) -> float:
        """The share of the peak rate for the next step: a short rise, then half a cosine."""
        spent = self.spent
        if spent < WARM_UP:
            return max(0.01, spent / WARM_UP)
        fall = (1 + math.cos(math.pi * (spent - WARM_UP) / (1 - WARM_UP))) / 2
        return FLOOR + (1 - FLOOR) * fall


def encode(tokenizer: Tokenizer, documents: list[Document], generator: torch.Generator) -> Tensor:
    """All documents as one row of tokens, shuffled, each followed by the end-of-text token."""
    order: list[int] = torch.randperm(len(documents), generator=generator).tolist()
    row: list[int] = []
    for index in order:
        row.extend(tokenizer.encode(documents[index].text, add_special_tokens=False).ids)
        row.append(0)
    return torch.tensor(row, dtype=torch.long)


def batches(row: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets without end; each pass over the row cuts it at other places and takes the pieces shuffled."""
    step = 0
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        starts = torch.arange(offset, len(row) - CONTEXT - 1, CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in starts[: len(starts) // BLOCKS * BLOCKS].view(-1, BLOCKS).tolist():
            blocks = torch.stack([row[start : start + CONTEXT + 1] for start in chosen])
            width = CONTEXT if step % LONG_EVERY == LONG_EVERY - 1 else SHORT
            yield blocks[:, :-1].reshape(-1, width), blocks[:, 1:].reshape(-1, width)
            step += 1


class Trainer:
    """The model, its optimizers and the precision in which steps are computed."""

    def __init__(self) -> None:
        self.model: Any = LlamaForCausalLM(LlamaConfig.from_dict(dict(CONFIG)))
        parameters = dict(self.model.named_parameters())
        count = sum(parameter.numel() for parameter in parameters.values())
        if count > MAX_PARAMETERS:
            raise ValueError(f"the model has {count} parameters, more than {MAX_PARAMETERS}")
        matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in parameters.items() if p.ndim != 2 or "embed" in name]
        # Muon is for matrices only. A trial of two minutes came to 5.9 nats a token with it, to 6.5 with AdamW alone.
        muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(muon, MATRIX_RATE), (adam, OTHER_RATE)]
        self.brain_float = False

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats a token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.brain_float):
            logits: Tensor = self.model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """One step at this share of the peak learning rates; returns the loss before it."""
        loss = self.loss(inputs, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def choose_precision(self, inputs: Tensor, targets: Tensor) -> dict[bool, float]:
        """Keeps the faster of float32 and bfloat16 on this processor; returns the seconds of each."""
        seconds: dict[bool, float] = {}
        for self.brain_float in (False, True):
            self.step(inputs, targets, share=0.0)  # a first pass allocates and is not measured
            started = time.monotonic()
            self.step(inputs, targets, share=0.0)
            seconds[self.brain_float] = time.monotonic() - started
        self.brain_float = seconds[True] < seconds[False]
        return seconds

    @torch.no_grad()
    def held_out_loss(self, row: Tensor, limit: int = 64) -> float:
        """The loss on text the model has not seen, in sequences as short as most of the training ones."""
        count = min(limit, (len(row) - 1) // SHORT)
        losses = [
            float(self.loss(row[start : start + SHORT][None], row[start + 1 : start + SHORT + 1][None]))
            for start in range(0, count * SHORT, SHORT)
        ]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def sample(self, tokenizer: Tokenizer, tokens: int = 40) -> str:
        """Greedy continuation of a fixed prompt, for the log."""
        ids: list[int] = tokenizer.encode(PROMPT).ids
        for _ in range(tokens):
            logits: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        return tokenizer.decode(ids)


def say(text: str) -> None:
    """One progress line."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def train(out: Path, minutes: float, max_tokens: int, seed: int, every: float) -> Progress:
    """Trains until the budget is spent, writing a checkpoint every so many minutes; returns the state at the end."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    documents = collect()
    say(f"{len(documents)} documents, {sum(len(document.text) for document in documents):,} characters")
    tokenizer = train_tokenizer(documents)
    write_tokenizer(out, tokenizer)
    row = encode(tokenizer, [document for document in documents if not document.held_out], generator)
    held_out = encode(tokenizer, [document for document in documents if document.held_out], generator)
    say(f"{len(row):,} tokens to learn from, {len(held_out):,} held out")

    trainer = Trainer()
    source = batches(row, generator)
    seconds = trainer.choose_precision(*next(source))
    say(f"seconds a step: {seconds[False]:.2f} float32, {seconds[True]:.2f} bfloat16")
    budget = Budget(minutes, max_tokens)
    command = f"python -m tandem.demo.train --minutes {minutes:g} --max-tokens {max_tokens} --seed {seed}"
    average, steps, written = 0.0, 0, 0.0
    while True:
        inputs, targets = next(source)
        average += (trainer.step(inputs, targets, budget.learning_rate()) - average) / min(steps + 1, AVERAGED)
        steps += 1
        budget.tokens += inputs.numel()
        finished = budget.spent >= 1.0
        if steps % 50 == 0 or finished:
            speed = budget.tokens / budget.elapsed / 60
            say(f"{budget.spent:6.1%} {budget.tokens:>10,} tokens, loss {average:.3f}, {speed:,.0f} tokens/s")
        if finished or budget.elapsed >= written + every:
            written = budget.elapsed
            loss = trainer.held_out_loss(held_out)
            progress = Progress(budget.tokens, len(row), budget.elapsed, average, loss, command, finished)
            write_weights(out, trainer.model, progress)
            say(f"checkpoint, held-out loss {loss:.3f}\n{trainer.sample(tokenizer)}\n")
            if finished:
                return progress


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tandem.demo.train", description=__doc__)
    parser.add_argument("--minutes", type=float, default=45.0, help="time to train for; 0 for no limit (default 45)")
    parser.add_argument("--max-tokens", type=int, default=20_000_000, help="tokens to read (default 20 million)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the text (default 0)")
    parser.add_argument("--out", type=Path, default=model_path(), help="folder to write (default: in the package)")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between checkpoints (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads to compute with (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.minutes, arguments.max_tokens, arguments.seed, arguments.every)


if __name__ == "__main__":
    main()

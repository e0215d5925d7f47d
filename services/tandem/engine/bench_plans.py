"""Drives a device with plans made by hand: prompts and decode steps of a given batch and context, timed."""

from __future__ import annotations

import random
import select
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from tandem.core.messages.plans import Plan, PlanResolved, Row, Sample
from tandem.core.messages.sampling import SamplingParams
from tandem.engine.pool import host_pool
from tandem.engine.start import Engine
from tandem.errors import TandemError

PROMPT_TOKENS = 1024
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_WAIT_SECONDS = 600.0
_NOISE_PAGES = 64


class TimedPlans:
    """Owns the device's pages; one measurement at a time. Pages lie scattered, as they do in a pool in use."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._pages = list(range(engine.layout.num_pages))
        self._random.shuffle(self._pages)
        self._plan_id = 0
        self._fill_pool()

    def prompt_rows(self, batch: int, prompt_tokens: int = PROMPT_TOKENS) -> list[Row]:
        """Rows that compute whole random prompts and sample their first tokens."""
        return [self._row(number, 0, prompt_tokens) for number in range(batch)]

    def rows_of(self, prompts: Sequence[Sequence[int]]) -> list[Row]:
        """Rows that compute these prompts, all of one length."""
        rows = self.prompt_rows(len(prompts), len(prompts[0]))
        return [replace(row, token_ids=tuple(prompt)) for row, prompt in zip(rows, prompts, strict=True)]

    def decode_rows(self, batch: int, context: int) -> list[Row]:
        """Rows that compute the last of `context` tokens; those before it are in the pool: its contents are random."""
        return [self._row(number, context - 1, 1) for number in range(batch)]

    def seconds(self, plans: Sequence[Sequence[Row]]) -> float:
        """Launch the plans one behind the other, wait for all results, and return how long that took."""
        return self.execute(plans)[0]

    def execute(self, plans: Sequence[Sequence[Row]]) -> tuple[float, list[int]]:
        """As `seconds`, with the sampled tokens of all rows."""
        began = time.perf_counter()
        for rows in plans:
            self._plan_id += 1
            self._engine.device.launch(Plan(self._plan_id, tuple(rows)))
        results = self._take(len(plans))
        seconds = time.perf_counter() - began
        return seconds, [row.token_id for result in results for row in result.rows if row.token_id is not None]

    def _take(self, count: int) -> list[PlanResolved]:
        results: list[PlanResolved] = []
        while len(results) < count:
            readable, _, _ = select.select([self._engine.device], [], [], _WAIT_SECONDS)
            if not readable:
                raise TandemError(f"the device did not answer within {_WAIT_SECONDS:g} s")
            results += self._engine.device.resolved()
        return results

    def _row(self, number: int, start: int, num_tokens: int) -> Row:
        layout = self._engine.layout
        count = -(-(start + num_tokens) // layout.page_tokens)
        vocabulary = self._engine.spec.vocab_size
        return Row(
            request_id=number,
            slot=number,
            start=start,
            num_tokens=num_tokens,
            token_ids=tuple(self._random.randrange(vocabulary) for _ in range(num_tokens)),
            pages=tuple(self._pages[number * count : (number + 1) * count]),
            sample=Sample(params=_GREEDY, output_index=0),
        )

    def _fill_pool(self) -> None:
        """Zeros would be read from memory that nobody has touched, which is no memory at all."""
        pool = host_pool(self._engine.memory, self._engine.layout)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(_NOISE_PAGES, *self._engine.layout.page_shape, generator=generator).to(pool.dtype)
        for start in range(0, len(pool), _NOISE_PAGES):
            part = pool[start : start + _NOISE_PAGES]
            part.copy_(noise[: len(part)])


def pages_needed(batch: int, num_tokens: int, page_tokens: int) -> int:
    return batch * -(-num_tokens // page_tokens)

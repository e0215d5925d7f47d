"""Executes plans: batch, forward pass, draws, log-probabilities. The order of plans is the caller's affair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem.core.messages.plans import Plan, Row, RowResult, Sample
from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.engine.batch import PlanTokens, build_batch
from tandem.engine.collectives import RankLinks
from tandem.engine.logprobs import token_logprobs
from tandem.engine.lora.adapters import AdapterStore
from tandem.engine.models.decoder import Decoder
from tandem.engine.sampler import sample_tokens

_PROMPT_LOGITS_ELEMENTS = 1 << 22  # logits of prompt positions computed at a time


@dataclass(frozen=True, slots=True)
class Launched:
    """A plan whose work has been issued to the device; `tokens` [sampled rows] may still be on their way."""

    plan: Plan
    sampled: tuple[int, ...]  # row numbers
    tokens: torch.Tensor
    logprobs: dict[int, TokenLogprob]
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]]


class PlanRunner:
    """The model, its pool, and the last token of each slot. Used by one thread, in inference mode.

    `links` tie it to the ranks that have the rest of the model, which run the same plans in the same order. Tokens are
    drawn, and log-probabilities made, by the first tensor rank of the last stage alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: torch.Tensor,
        max_running_requests: int,
        links: RankLinks | None = None,
        adapters: AdapterStore | None = None,
    ) -> None:
        self._decoder = decoder
        self._links = links or RankLinks()
        self._adapters = adapters
        self._pool = pool
        self._page_tokens = pool.shape[4]
        self._last_tokens = torch.zeros(max_running_requests, dtype=torch.int64, device=pool.device)

    def launch(self, plan: Plan) -> Launched:
        """Issue a plan's work: KV into the pool, sampled tokens into the slots. On a CPU it is done on return."""
        tokens = build_batch(plan, self._page_tokens)
        adapters = self._adapters.rows_of(plan, tokens.batch.offsets) if self._adapters is not None else ()
        residual = self._inputs(tokens)
        self._decoder.run_layers(residual, tokens.batch, self._pool, adapters)
        for row in plan.rows:
            if row.zero_tail:
                self._zero_tail(row)
        if not self._links.place.is_last_stage:
            assert self._links.stages is not None
            self._links.stages.send(residual)
            return Launched(plan, (), torch.empty(0, dtype=torch.int64), {}, {})
        prompt_logprobs = {
            number: self._prompt_logprobs(row, residual[tokens.batch.offsets[number] :][: row.num_tokens])
            for number, row in enumerate(plan.rows)
            if row.prompt_logprobs is not None
        }
        sampled = [(number, row.sample) for number, row in enumerate(plan.rows) if row.sample is not None]
        if not sampled:
            return Launched(plan, (), torch.empty(0, dtype=torch.int64), {}, prompt_logprobs)
        numbers, samples = zip(*sampled, strict=True)
        last = self._to_device(tokens.batch.offsets[[number + 1 for number in numbers]] - 1)
        logits = self._logits(residual[last])
        drawn = torch.empty_like(last) if logits is None else sample_tokens(logits, samples)
        if self._links.tensor is not None:
            self._links.tensor.share_tokens(drawn)
        self._last_tokens[self._to_device([plan.rows[number].slot for number in numbers])] = drawn
        if logits is None:
            return Launched(plan, (), torch.empty(0, dtype=torch.int64), {}, {})
        return Launched(plan, numbers, drawn, _logprobs(numbers, samples, logits, drawn), prompt_logprobs)

    def finish(self, launched: Launched) -> tuple[RowResult, ...]:
        """Wait for a launched plan and give the results of its rows, in order."""
        token_ids = dict(zip(launched.sampled, launched.tokens.tolist(), strict=True))
        return tuple(
            RowResult(token_ids.get(number), launched.logprobs.get(number), launched.prompt_logprobs.get(number, ()))
            for number in range(len(launched.plan.rows))
        )

    def run(self, plan: Plan) -> tuple[RowResult, ...]:
        return self.finish(self.launch(plan))

    def warm_up(self) -> None:
        """Compute one token, so that libraries set themselves up before the first request. Clears what it wrote."""
        sample = Sample(params=SamplingParams(temperature=0.0), output_index=0)
        row = Row(request_id=0, slot=0, start=0, num_tokens=1, token_ids=(0,), pages=(0,), sample=sample)
        self.run(Plan(0, (row,)))
        self._pool[0].zero_()

    @property
    def waited_seconds(self) -> float:
        """How long this rank has waited for stages before its own, in all."""
        return self._links.stages.waited_seconds if self._links.stages is not None else 0.0

    def _inputs(self, tokens: PlanTokens) -> torch.Tensor:
        """The residual stream before this rank's first layer, [N, hidden] float32."""
        if self._links.place.is_first_stage:
            return self._decoder.embed(self._input_ids(tokens))
        assert self._links.stages is not None
        residual = torch.empty(tokens.batch.num_tokens, self._decoder.hidden_size, device=self._pool.device)
        self._links.stages.receive(residual)
        return residual

    def _logits(self, residual: torch.Tensor) -> torch.Tensor | None:
        """[n, hidden] -> [n, vocabulary]; None on ranks that only have a part of it."""
        part = self._decoder.logits(residual)
        return part if self._links.tensor is None else self._links.tensor.gather_logits(part)

    def _input_ids(self, tokens: PlanTokens) -> torch.Tensor:
        ids = torch.from_numpy(tokens.token_ids).to(self._pool.device)
        if len(tokens.unseen):
            ids[self._to_device(tokens.unseen)] = self._last_tokens[self._to_device(tokens.unseen_slots)]
        return ids

    def _zero_tail(self, row: Row) -> None:
        page, used = divmod(row.start + row.num_tokens, self._page_tokens)
        if used:
            self._pool[row.pages[page], :, :, :, used:] = 0

    def _prompt_logprobs(self, row: Row, residual: torch.Tensor) -> tuple[TokenLogprob, ...]:
        """Describe the token after each position of the chunk, as far as it is known."""
        following = row.token_ids[1:] if row.next_token_id is None else (*row.token_ids[1:], row.next_token_id)
        targets = self._to_device(following)
        vocabulary = self._decoder.vocab_size
        at_once = max(1, _PROMPT_LOGITS_ELEMENTS // vocabulary)
        described: list[TokenLogprob] = []
        for start in range(0, len(following), at_once):
            part = slice(start, min(start + at_once, len(following)))
            logits = self._logits(residual[part])
            if logits is not None:
                described += token_logprobs(logits, targets[part], [row.prompt_logprobs or 0] * len(logits))
        return tuple(described)

    def _to_device(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self._pool.device)


def _logprobs(
    numbers: Sequence[int], samples: Sequence[Sample], logits: torch.Tensor, drawn: torch.Tensor
) -> dict[int, TokenLogprob]:
    """Log-probabilities of the drawn tokens, for the rows that ask for them."""
    wanted = [index for index, sample in enumerate(samples) if sample.params.logprobs is not None]
    if not wanted:
        return {}
    num_top = [samples[index].params.logprobs or 0 for index in wanted]
    described = token_logprobs(logits[wanted], drawn[wanted], num_top)
    return {numbers[index]: logprob for index, logprob in zip(wanted, described, strict=True)}

"""What rank 0 decides and what the device reports: one forward pass, its rows, its result."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.core.messages.sampling import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Draw one token from the row's last position.

    `output_index` is the absolute index of the token to draw. `banned` tokens get no probability (EOS and stop tokens
    while `output_index < min_tokens`). `history` (prompt, then outputs) and `num_prompt` are set only if
    `params.needs_history`.
    """

    params: SamplingParams
    output_index: int
    banned: tuple[int, ...] = ()
    history: tuple[int, ...] = ()
    num_prompt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request's part of a plan: compute positions [start, start + num_tokens) over what its pages hold before.

    `token_ids` are the known input tokens. Empty: one token, the last one that the device sampled for `slot`
    (a speculative row of the overlap loop). `pages[i]` holds positions [i * page_tokens, (i + 1) * page_tokens) and
    covers at least start + num_tokens positions. `zero_tail`: fill the slots after the last position of this row in
    its page with zeros (the page is going to be announced and hashed).
    """

    request_id: int
    slot: int  # device-resident state of the request; 0 <= slot < max_running_requests
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    pages: tuple[int, ...]
    sample: Sample | None = None  # None: a prompt chunk that is not the last
    prompt_logprobs: int | None = (
        None  # set: log-probabilities of this chunk's *next* tokens, with that many alternatives
    )
    next_token_id: int | None = None  # with prompt_logprobs: the known token after this chunk, if there is one
    zero_tail: bool = False
    adapter: str = ""  # digest of the LoRA adapter that computes it; empty: none


@dataclass(frozen=True, slots=True)
class Plan:
    """One decided forward pass. Devices execute plans in `plan_id` order and resolve them in that order."""

    plan_id: int
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came of a row, in the order of the plan's rows. `token_id` is None where nothing was sampled."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanResolved:
    """A plan has been executed: its KV is in the pool and its tokens are known. An event like any other."""

    plan_id: int
    rows: tuple[RowResult, ...]
    device_seconds: float = 0.0  # time in which the device computed this plan; of several ranks, the slowest one's

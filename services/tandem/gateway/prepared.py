"""What passes between the gateway's parts about one request: the checked request, and what its answer is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tandem.core.messages.requests import Timing
from tandem.core.messages.sampling import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What the client wants to see of the answer."""

    token_ids: bool = False
    text: bool = True
    skip_special: bool = True
    include_stop: bool = False
    interval_tokens: int = 1  # tokens of one message at least; the first is sent at once
    usage_in_every_message: bool = False
    worker_names: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that passed every check: `num_sequences` answers to one prompt."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams  # every default resolved; sequence i draws with seed + i
    num_sequences: int = 1
    stop_strings: tuple[str, ...] = ()
    end_token_ids: frozenset[int] = frozenset()  # an output token that ends the answer: EOS and stop tokens
    output: Output = field(default_factory=Output)
    echo: str = ""  # text before the answer's own
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""  # name of a LoRA adapter
    adapter_digest: str = ""  # the same weights in all lives of the request
    traceparent: str = ""


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How one sequence ended, and what it took."""

    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    timing: Timing = field(default_factory=Timing)
    decode_worker: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output of one sequence. `num_tokens` counts the tokens behind it, shown or not."""

    index: int
    num_tokens: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None

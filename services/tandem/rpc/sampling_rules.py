"""The ranges that sampling parameters may have, checked by the gateway and again by every worker that is submitted to.

Field names in the errors are those of the public API. Not here: what depends on the prompt, and the defaults.
"""

from __future__ import annotations

import math

from tandem.core.messages.sampling import SamplingParams
from tandem.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGIT_BIAS_VALUE = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 100.0
MAX_TEMPERATURE = 100.0


def check_sampling(params: SamplingParams, *, vocab_size: int = 0) -> None:
    """Raise InvalidRequest for the first value out of range; `vocab_size` 0 skips the checks of token ids."""
    _between("sampling.temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    if not 0.0 < params.top_p <= 1.0:
        raise InvalidRequest(f"top_p is {params.top_p:g}, must be in (0, 1]", field="sampling.top_p")
    if params.top_k < 0:
        raise InvalidRequest(f"top_k is {params.top_k}, must be -1 or 0 (off) or more", field="sampling.top_k")
    _between("sampling.min_p", params.min_p, 0.0, 1.0)
    _between("sampling.presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _between("sampling.frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if not 0.0 < params.repetition_penalty <= MAX_REPETITION_PENALTY:
        raise InvalidRequest(
            f"repetition_penalty is {params.repetition_penalty:g}, must be in (0, {MAX_REPETITION_PENALTY:g}]",
            field="sampling.repetition_penalty",
        )
    _check_counts(params)
    _check_token_ids(params, vocab_size)


def _check_counts(params: SamplingParams) -> None:
    if params.max_tokens < 0:
        raise InvalidRequest("max_tokens is negative", field="sampling.max_tokens")
    if not 0 <= params.min_tokens <= params.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens}, must be at most max_tokens, {params.max_tokens}",
            field="sampling.min_tokens",
        )
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InvalidRequest(f"{name} is {count}, must be at most {MAX_LOGPROBS}", field=f"output.{name}")


def _check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"{len(params.stop_token_ids)} stop token ids, at most {MAX_STOP_TOKEN_IDS}", field="stop.stop_token_ids"
        )
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"{len(params.logit_bias)} logit biases, at most {MAX_LOGIT_BIAS}", field="sampling.logit_bias"
        )
    for _, bias in params.logit_bias:
        _between("sampling.logit_bias", bias, -MAX_LOGIT_BIAS_VALUE, MAX_LOGIT_BIAS_VALUE)
    if vocab_size:
        check_token_ids([token_id for token_id, _ in params.logit_bias], vocab_size, "sampling.logit_bias")
        check_token_ids(params.stop_token_ids, vocab_size, "stop.stop_token_ids")


def check_token_ids(token_ids: list[int] | tuple[int, ...], vocab_size: int, field: str) -> None:
    """Raise InvalidRequest naming `field` if an id is outside of [0, vocab_size)."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        bad = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"token id {bad} is not in the vocabulary of {vocab_size}", field=field)


def _between(field: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        name = field.rpartition(".")[2]
        raise InvalidRequest(f"{name} is {value:g}, must be between {low:g} and {high:g}", field=field)

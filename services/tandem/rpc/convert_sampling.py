"""Sampling parameters, log-probabilities and durations: core.messages values to protobuf and back.

Shared by sessions and hand-offs. `*_from_proto` parses what a peer sent and raises InvalidRequest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from google.protobuf import duration_pb2

from tandem.core.messages.sampling import SamplingParams, TokenLogprob
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as inference_pb2
from tandem.rpc.sampling_rules import check_sampling

_MAX_SECONDS = 10.0**9


def duration_to_proto(seconds: float) -> duration_pb2.Duration:
    """Return `seconds` as a Duration, to the nanosecond."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(min(max(seconds, -_MAX_SECONDS), _MAX_SECONDS) * 1e9))
    return duration


def duration_from_proto(duration: duration_pb2.Duration) -> float:
    """Return a Duration as seconds."""
    return (duration.seconds * 10**9 + duration.nanos) / 10**9  # one rounding: what was sent comes back


# ---- sampling -----------------------------------------------------------------------------------------------------


def sampling_to_proto(
    params: SamplingParams,
) -> tuple[inference_pb2.SamplingParams, inference_pb2.StopConditions, inference_pb2.OutputOptions]:
    """Return `params` as the three messages that Submit and Open carry, every scalar set."""
    sampling = inference_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        n=1,
        seed=params.seed,
        logit_bias=dict(params.logit_bias),
    )
    stop = inference_pb2.StopConditions(stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos)
    output = inference_pb2.OutputOptions()
    if params.logprobs is not None:
        output.logprobs = params.logprobs
    if params.prompt_logprobs is not None:
        output.prompt_logprobs = params.prompt_logprobs
    return sampling, stop, output


def sampling_from_proto(
    sampling: inference_pb2.SamplingParams,
    stop: inference_pb2.StopConditions,
    output: inference_pb2.OutputOptions,
    *,
    defaults: SamplingParams | None = None,
) -> SamplingParams:
    """Return the values that are set, `defaults` for the others; ranges are checked, token ids are not."""
    base = SamplingParams() if defaults is None else defaults

    def number(name: str, default: float) -> float:
        return getattr(sampling, name) if sampling.HasField(name) else default  # type: ignore[arg-type]

    params = SamplingParams(
        temperature=number("temperature", base.temperature),
        top_p=number("top_p", base.top_p),
        top_k=_top_k(int(number("top_k", base.top_k))),
        min_p=number("min_p", base.min_p),
        repetition_penalty=number("repetition_penalty", base.repetition_penalty),
        presence_penalty=number("presence_penalty", base.presence_penalty),
        frequency_penalty=number("frequency_penalty", base.frequency_penalty),
        seed=int(number("seed", base.seed)),
        max_tokens=int(number("max_tokens", base.max_tokens)),
        min_tokens=int(number("min_tokens", base.min_tokens)),
        stop_token_ids=tuple(stop.stop_token_ids),
        ignore_eos=stop.ignore_eos,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
    )
    check_sampling(params)
    return params


def _top_k(value: int) -> int:
    return 0 if value == -1 else value


# ---- log-probabilities --------------------------------------------------------------------------------------------


def logprob_to_proto(
    value: TokenLogprob, token_bytes: Callable[[int], bytes] | None = None
) -> inference_pb2.TokenLogprob:
    """Return `value` on the wire, with the tokens' bytes if `token_bytes` knows them."""
    message = inference_pb2.TokenLogprob(token_id=value.token_id)
    if value.logprob is not None:
        message.logprob = value.logprob
    if token_bytes is not None:
        message.token = token_bytes(value.token_id)
    for token_id, logprob in value.top:
        token = token_bytes(token_id) if token_bytes is not None else b""
        message.top.add(token_id=token_id, logprob=logprob, token=token)
    return message


def logprobs_from_proto(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Return the values of `messages`; the tokens' bytes are dropped."""
    return tuple(
        TokenLogprob(
            token_id=message.token_id,
            logprob=message.logprob if message.HasField("logprob") else None,
            top=tuple((top.token_id, top.logprob) for top in message.top),
        )
        for message in messages
    )

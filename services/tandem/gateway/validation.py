"""Every rule that a request must meet, each with the field it names. Raises InvalidRequest; changes nothing.

First what can be said of the message alone, then what needs the prompt's token ids. Ranges of sampling values are in
`tandem.rpc.sampling_rules`, shared with the workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tandem.core.messages.sampling import SamplingParams
from tandem.errors import InvalidRequest, NotFound
from tandem.gateway.limits import (
    GREEDY_BELOW,
    MAX_CACHE_SALT_CHARS,
    MAX_MESSAGES,
    MAX_REQUEST_ID_CHARS,
    MAX_SEQUENCES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    ModelLimits,
)
from tandem.rpc.convert_sampling import sampling_from_proto
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.sampling_rules import check_sampling, check_token_ids

MAX_ADAPTERS_SHOWN = 16
DEFAULT_MAX_TOKENS = 1 << 20  # where no worker has told its limits yet
_MEDIA = ("image", "audio", "video")


def check_model(model: str, served: Sequence[str]) -> None:
    """Raise NotFound for another model than the one that is served."""
    if model and model not in served:
        raise NotFound(f"model {model!r} is not served here; {served[0]!r} is", field="model")


def adapter_digest(name: str, served: Mapping[str, str]) -> str:
    """Return the digest of the adapter that a request names, empty for none; raises NotFound if nobody serves it."""
    if name and name not in served:
        known = ", ".join(sorted(served)[:MAX_ADAPTERS_SHOWN]) or "none"
        raise NotFound(f"adapter {name[:64]!r} is not served here; served: {known}", field="lora_adapter")
    return served[name] if name else ""


def check_request_id(request_id: str) -> None:
    """Raise InvalidRequest for an id that cannot stand in a header or a log line."""
    if len(request_id) > MAX_REQUEST_ID_CHARS or not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest(
            f"a request id has at most {MAX_REQUEST_ID_CHARS} printable ASCII characters", field="request_id"
        )


def check_generate(request: pb.GenerateRequest, max_prompt_bytes: int) -> None:
    """Check everything but the sampling ranges and what needs the prompt's ids."""
    match request.WhichOneof("prompt"):
        case "text":
            check_text(request.text, max_prompt_bytes, "text")
        case "token_ids" if not request.token_ids.ids:
            raise InvalidRequest("the prompt is empty", field="token_ids")
        case None:
            raise InvalidRequest("the request has no prompt", field="prompt")
    check_options(request.sampling, request.stop, request.hints)


def check_chat(request: pb.ChatRequest, max_prompt_bytes: int) -> None:
    """Check everything but the sampling ranges and what needs the prompt's ids."""
    if not request.messages:
        raise InvalidRequest("there are no messages", field="messages")
    if len(request.messages) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(request.messages)} messages, at most {MAX_MESSAGES}", field="messages")
    if len(request.tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(request.tools)} tools, at most {MAX_TOOLS}", field="tools")
    if request.tool_choice not in ("", "auto", "none"):
        raise _unsupported("a forced tool choice", "tool_choice")
    num_bytes = 0
    for i, message in enumerate(request.messages):
        if not message.role:
            raise InvalidRequest(f"message {i} has no role", field=f"messages[{i}].role")
        num_bytes += message.ByteSize()
        for part in message.content:
            kind = part.WhichOneof("part")
            if kind in _MEDIA:
                raise _unsupported(f"{kind} content", f"messages[{i}].content")
    if num_bytes > max_prompt_bytes:
        raise InvalidRequest(f"the messages have more than {max_prompt_bytes} bytes", field="messages")
    check_options(request.sampling, request.stop, request.hints)


def check_text(text: str, max_bytes: int, field: str) -> None:
    """Check that a text is there and not too long."""
    if not text:
        raise InvalidRequest("the prompt is empty", field=field)
    # A character has at least one byte: the usual short text is not encoded to be measured.
    if len(text) > max_bytes or (len(text) * 4 > max_bytes and len(text.encode()) > max_bytes):
        raise InvalidRequest(f"the text has more than {max_bytes} bytes", field=field)


def check_options(sampling: pb.SamplingParams, stop: pb.StopConditions, hints: pb.RoutingHints) -> None:
    """Check what both kinds of request have: unsupported features, n, stop strings, hints."""
    constraint = sampling.WhichOneof("constraint")
    if constraint:
        raise _unsupported(f"constrained output ({constraint})", f"sampling.{constraint}")
    if sampling.extra.fields:
        raise _unsupported(f"the extra parameter {min(sampling.extra.fields)!r}", "sampling.extra")
    if sampling.HasField("n") and not 1 <= sampling.n <= MAX_SEQUENCES:
        raise InvalidRequest(f"n is {sampling.n}, must be between 1 and {MAX_SEQUENCES}", field="sampling.n")
    if len(stop.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"{len(stop.stop)} stop strings, at most {MAX_STOP_STRINGS}", field="stop.stop")
    for text in stop.stop:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string has 1 to {MAX_STOP_CHARS} characters, not {len(text)}", field="stop.stop"
            )
    if len(hints.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(f"at most {MAX_CACHE_SALT_CHARS} characters", field="hints.cache_salt")


def check_prompt(token_ids: Sequence[int], limits: ModelLimits, field: str) -> None:
    """Check the prompt against the vocabulary and the longest one that a worker takes."""
    if not token_ids:
        raise InvalidRequest("the prompt has no tokens", field=field)
    longest = limits.max_prompt_tokens or limits.max_context_tokens
    if longest and len(token_ids) > longest:
        raise InvalidRequest(f"the prompt has {len(token_ids)} tokens, at most {longest} fit", field=field)
    if limits.vocab_size:
        check_token_ids(tuple(token_ids), limits.vocab_size, field)


def resolve_sampling(
    sampling: pb.SamplingParams,
    stop: pb.StopConditions,
    output: pb.OutputOptions,
    *,
    defaults: SamplingParams,
    seed: int,
    prompt_tokens: int,
    limits: ModelLimits,
) -> SamplingParams:
    """Return the sampling with every default resolved. `seed` is used where the client gave none.

    Without max_tokens the answer may take all that fits; with it, prompt and answer must fit.
    """
    room = limits.max_output_tokens(prompt_tokens)
    fits = DEFAULT_MAX_TOKENS if room is None else room
    if sampling.HasField("max_tokens"):
        if room is not None and sampling.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {sampling.max_tokens}, only {room} fit after a prompt of {prompt_tokens} tokens",
                field="sampling.max_tokens",
            )
    elif fits == 0:
        raise InvalidRequest(f"the prompt of {prompt_tokens} tokens leaves no room for an answer", field="prompt")
    values = replace(defaults, seed=seed, max_tokens=fits)
    params = sampling_from_proto(sampling, stop, output, defaults=values)
    if params.temperature < GREEDY_BELOW:
        params = replace(params, temperature=0.0)
    check_sampling(params, vocab_size=limits.vocab_size)
    return params


def default_sampling(generation_config: Mapping[str, object]) -> SamplingParams:
    """Return the model's own defaults, where it names them; raises InvalidRequest for values out of range."""
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values: dict[str, Any] = {n: value for n in known if isinstance(value := generation_config.get(n), int | float)}
    params = replace(SamplingParams(), **values)
    if params.top_k == -1:
        params = replace(params, top_k=0)
    check_sampling(params)
    return params


def _unsupported(what: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"{what} is not supported", field=field, reason="UNSUPPORTED")

"""Deltas to the messages of the public API."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tandem.core.messages.sampling import TokenLogprob
from tandem.gateway.prepared import Delta, Finish, FinishReason, Prepared
from tandem.rpc.convert import timing_to_proto
from tandem.rpc.convert_sampling import logprob_to_proto
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb

_FINISH = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


class StreamReplies:
    """Messages of one stream: identity on the first, a finish on each index's last, usage and timing at the end."""

    def __init__(self, prepared: Prepared, token_bytes: Callable[[int], bytes]) -> None:
        self._prepared = prepared
        self._token_bytes = token_bytes
        self._first = True
        self._started: set[int] = set()
        self._finishes: list[Finish] = []
        self._num_tokens = 0

    def message(self, delta: Delta) -> pb.StreamGenerateResponse:
        """Return the message for the next delta."""
        prepared = self._prepared
        self._num_tokens += delta.num_tokens
        message = pb.StreamGenerateResponse(index=delta.index, text=delta.text, token_ids=delta.token_ids)
        if self._first:
            self._first = False
            message.request_id, message.model = prepared.request_id, prepared.model
            if prepared.output.token_ids:
                message.prompt_token_ids.extend(prepared.prompt_token_ids)
        if prepared.echo and delta.index not in self._started:
            self._started.add(delta.index)
            message.text = prepared.echo + delta.text
        if delta.logprobs:
            message.logprobs.extend(_logprobs(delta.logprobs, self._token_bytes))
        if delta.prompt_logprobs:
            message.prompt_logprobs.extend(_logprobs(delta.prompt_logprobs, self._token_bytes))
        if prepared.output.usage_in_every_message:
            message.usage.prompt_tokens = len(prepared.prompt_token_ids)
            message.usage.completion_tokens = self._num_tokens
        if delta.finish is not None:
            self._finish(message, delta.finish)
        return message

    def _finish(self, message: pb.StreamGenerateResponse, finish: Finish) -> None:
        self._finishes.append(finish)
        message.finish_reason = _FINISH[finish.reason]
        if finish.stop_string is not None:
            message.stop_string = finish.stop_string
        elif finish.stop_token_id is not None:
            message.stop_token_id = finish.stop_token_id
        if len(self._finishes) == self._prepared.num_sequences:
            message.usage.CopyFrom(usage(self._finishes))
            message.timing.CopyFrom(_timing(self._prepared, finish))


def response(prepared: Prepared, deltas: Iterable[Delta], token_bytes: Callable[[int], bytes]) -> pb.GenerateResponse:
    """Return the one message of a unary call; `deltas` has one a sequence, finished."""
    message = pb.GenerateResponse(request_id=prepared.request_id, model=prepared.model)
    finishes = []
    for delta in sorted(deltas, key=lambda delta: delta.index):
        finish = delta.finish
        assert finish is not None
        finishes.append(finish)
        choice = message.choices.add(
            index=delta.index,
            text=prepared.echo + delta.text,
            token_ids=delta.token_ids,
            logprobs=_logprobs(delta.logprobs, token_bytes),
            finish_reason=_FINISH[finish.reason],
        )
        if finish.stop_string is not None:
            choice.stop_string = finish.stop_string
        elif finish.stop_token_id is not None:
            choice.stop_token_id = finish.stop_token_id
        if delta.prompt_logprobs and not message.prompt_logprobs:
            message.prompt_logprobs.extend(_logprobs(delta.prompt_logprobs, token_bytes))
    if prepared.output.token_ids:
        message.prompt_token_ids.extend(prepared.prompt_token_ids)
    message.usage.CopyFrom(usage(finishes))
    message.timing.CopyFrom(_timing(prepared, finishes[-1]))
    return message


def usage(finishes: Iterable[Finish]) -> pb.Usage:
    """Return the usage of a request: its prompt once, every answer's tokens."""
    total = pb.Usage()
    for finish in finishes:
        total.prompt_tokens = finish.prompt_tokens
        total.completion_tokens += finish.completion_tokens
        total.cached_tokens = max(total.cached_tokens, finish.cached_tokens)
    return total


def _timing(prepared: Prepared, finish: Finish) -> pb.Timing:
    timing = timing_to_proto(finish.timing, decode_worker=finish.decode_worker)
    if not prepared.output.worker_names:
        timing.ClearField("prefill_worker")
        timing.ClearField("decode_worker")
    return timing


def _logprobs(values: Iterable[TokenLogprob], token_bytes: Callable[[int], bytes]) -> list[pb.TokenLogprob]:
    return [logprob_to_proto(value, token_bytes) for value in values]

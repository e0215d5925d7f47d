"""Requests, tokens and ends: core.messages values to protobuf and back, for the gateway and for workers.

`*_from_proto` parses what a peer sent: it raises InvalidRequest for what cannot be meant. On a session the wire's `rid`
stands for `request_id`; who numbers requests differently passes the number. Sampling is in `convert_sampling`, worker
facts are in `convert_worker`.
"""

from __future__ import annotations

from tandem import errors
from tandem.core.messages.requests import Ended, EndReason, PrefillPeer, Submit, Timing, Tokens
from tandem.core.token_ids import BYTES_PER_TOKEN
from tandem.rpc import status
from tandem.rpc.convert_sampling import (
    duration_from_proto,
    duration_to_proto,
    logprob_to_proto,
    logprobs_from_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as inference_pb2
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2

ABORT_STOP = "STOP"  # Abort.reason: a stop string matched; anything else cancels
ID_BYTES = 16
MAX_PREFILL_PEERS = 8
MAX_SALT_CHARS = 256
MAX_ADAPTER_CHARS = 128  # of a name, and of a digest
_FINISHED = {
    EndReason.STOP: inference_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_REASONS = {finish: reason for reason, finish in _FINISHED.items()}


# ---- submit -------------------------------------------------------------------------------------------------------


def submit_to_proto(submit: Submit, *, request_name: str = "", traceparent: str = "") -> worker_pb2.Submit:
    """Return `submit` on the wire; `request_name` is the public request id, for logs."""
    sampling, stop, output = sampling_to_proto(submit.sampling)
    message = worker_pb2.Submit(
        rid=submit.request_id,
        request_id=request_name,
        prompt_token_ids=submit.prompt_token_ids,
        sampling=sampling,
        stop=stop,
        output=output,
        priority=submit.priority,
        cache_salt=submit.cache_salt,
        traceparent=traceparent,
        output_token_ids=submit.output_token_ids,
        lora_adapter=submit.adapter,
        lora_digest=submit.adapter_digest,
    )
    for peer in submit.peers:
        message.prefill.add(
            handoff_address=peer.address,
            instance_id=peer.instance_id,
            handoff_id=peer.handoff_id,
            attempt=peer.attempt,
            output_tokens=peer.output_tokens,
        )
    if submit.timeout_seconds is not None:
        message.timeout.CopyFrom(duration_to_proto(submit.timeout_seconds))
    return message


def submit_from_proto(message: worker_pb2.Submit, request_id: int | None = None) -> Submit:
    """Return what a gateway submits, under `request_id` instead of its `rid` if given.

    Raises InvalidRequest for broken token ids, ids of a wrong size, sampling out of range, and features of the API
    that no worker has. What depends on the model (vocabulary, lengths) is left to the caller.
    """
    for name, packed in (("prompt", message.prompt_token_ids), ("output_token_ids", message.output_token_ids)):
        if len(packed) % BYTES_PER_TOKEN:
            raise errors.InvalidRequest(f"{name} is not a whole number of packed token ids", field=name)
    if not message.prompt_token_ids:
        raise errors.InvalidRequest("the prompt is empty", field="prompt")
    if len(message.prefill) > MAX_PREFILL_PEERS:
        raise errors.InvalidRequest(
            f"{len(message.prefill)} prefill peers, at most {MAX_PREFILL_PEERS}", field="prefill"
        )
    if len(message.cache_salt) > MAX_SALT_CHARS:
        raise errors.InvalidRequest(f"cache_salt is longer than {MAX_SALT_CHARS} characters", field="hints.cache_salt")
    if max(len(message.lora_adapter), len(message.lora_digest)) > MAX_ADAPTER_CHARS:
        raise errors.InvalidRequest(f"lora_adapter has more than {MAX_ADAPTER_CHARS} characters", field="lora_adapter")
    if message.sampling.WhichOneof("constraint"):
        raise errors.InvalidRequest("constrained output is not supported", field="sampling", reason="UNSUPPORTED")
    if message.stop.stop:
        raise errors.InvalidRequest("stop strings are matched by the gateway", field="stop.stop", reason="UNSUPPORTED")
    return Submit(
        request_id=message.rid if request_id is None else request_id,
        prompt_token_ids=message.prompt_token_ids,
        sampling=sampling_from_proto(message.sampling, message.stop, message.output),
        output_token_ids=message.output_token_ids,
        peers=tuple(_peer_from_proto(peer) for peer in message.prefill),
        timeout_seconds=duration_from_proto(message.timeout) if message.HasField("timeout") else None,
        priority=message.priority,
        cache_salt=message.cache_salt,
        adapter=message.lora_adapter,
        adapter_digest=message.lora_digest,
    )


def _peer_from_proto(message: worker_pb2.PrefillPeer) -> PrefillPeer:
    if len(message.handoff_id) != ID_BYTES or len(message.instance_id) != ID_BYTES:
        raise errors.InvalidRequest(f"handoff_id and instance_id must have {ID_BYTES} bytes", field="prefill")
    return PrefillPeer(
        address=message.handoff_address,
        instance_id=message.instance_id,
        handoff_id=message.handoff_id,
        attempt=message.attempt,
        output_tokens=message.output_tokens,
    )


# ---- tokens and ends ----------------------------------------------------------------------------------------------


def tokens_to_proto(tokens: Tokens, rid: int | None = None) -> worker_pb2.SequenceDelta:
    """Return new output on the wire, under `rid` instead of `request_id` if given."""
    return worker_pb2.SequenceDelta(
        rid=tokens.request_id if rid is None else rid,
        first_index=tokens.first_index,
        token_ids=tokens.token_ids,
        logprobs=[logprob_to_proto(value) for value in tokens.logprobs],
        prompt_logprobs=[logprob_to_proto(value) for value in tokens.prompt_logprobs],
    )


def tokens_from_proto(message: worker_pb2.SequenceDelta) -> Tokens:
    """Return new output; `request_id` is the wire's rid."""
    return Tokens(
        message.rid,
        message.first_index,
        tuple(message.token_ids),
        logprobs_from_proto(message.logprobs) if message.logprobs else (),
        logprobs_from_proto(message.prompt_logprobs) if message.prompt_logprobs else (),
    )


def timing_to_proto(timing: Timing, *, decode_worker: str = "") -> inference_pb2.Timing:
    """Return `timing` on the wire; `decode_worker` names who measured it."""
    return inference_pb2.Timing(
        queue=duration_to_proto(timing.queue_seconds),
        prefill=duration_to_proto(timing.prefill_seconds),
        kv_transfer=duration_to_proto(timing.transfer_seconds),
        decode=duration_to_proto(timing.decode_seconds),
        prefill_worker=timing.prefill_worker,
        decode_worker=decode_worker,
        kv_bytes=timing.transfer_bytes,
        kv_transport=timing.transport,
        first_decode=duration_to_proto(timing.first_decode_seconds),
    )


def timing_from_proto(message: inference_pb2.Timing) -> Timing:
    """Return a worker's timing; the name of the decode worker is dropped."""
    return Timing(
        queue_seconds=duration_from_proto(message.queue),
        prefill_seconds=duration_from_proto(message.prefill),
        transfer_seconds=duration_from_proto(message.kv_transfer),
        first_decode_seconds=duration_from_proto(message.first_decode),
        decode_seconds=duration_from_proto(message.decode),
        transfer_bytes=message.kv_bytes,
        transport=message.kv_transport,
        prefill_worker=message.prefill_worker,
    )


def ended_to_proto(ended: Ended, rid: int | None = None) -> worker_pb2.SequenceEnd:
    """Return an end on the wire: a finish reason, or ABORT with the status that `ended_error` gives."""
    message = worker_pb2.SequenceEnd(
        rid=ended.request_id if rid is None else rid,
        finish_reason=_FINISHED.get(ended.reason, inference_pb2.FINISH_REASON_ABORT),
        stop_token_id=ended.stop_token_id,
        usage=inference_pb2.Usage(
            prompt_tokens=ended.prompt_tokens,
            completion_tokens=ended.completion_tokens,
            cached_tokens=ended.cached_tokens,
        ),
        timing=timing_to_proto(ended.timing),
        prompt_logprobs=[logprob_to_proto(value) for value in ended.prompt_logprobs],
    )
    error = ended_error(ended)
    if error is not None:
        message.error.CopyFrom(status.to_status(error))
    return message


def ended_from_proto(message: worker_pb2.SequenceEnd) -> Ended:
    """Return an end; `request_id` is the wire's rid."""
    failure = ended_from_error(message.rid, status.from_status(message.error)) if message.HasField("error") else None
    reason = failure.reason if failure is not None else _REASONS.get(message.finish_reason, EndReason.FAILED)
    return Ended(
        request_id=message.rid,
        reason=reason,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        prompt_tokens=message.usage.prompt_tokens,
        completion_tokens=message.usage.completion_tokens,
        cached_tokens=message.usage.cached_tokens,
        prompt_logprobs=logprobs_from_proto(message.prompt_logprobs),
        timing=timing_from_proto(message.timing),
        message=failure.message if failure is not None else "",
        field_name=failure.field_name if failure is not None else "",
        overloaded=failure.overloaded if failure is not None else False,
    )


def ended_error(ended: Ended) -> errors.TandemError | None:
    """Return the error that this end is for the client; None where it has its answer."""
    message = ended.message
    match ended.reason:
        case EndReason.STOP | EndReason.LENGTH | EndReason.HANDED_OFF:
            return None
        case EndReason.CANCELLED:
            return errors.Cancelled(message or "cancelled")
        case EndReason.DEADLINE:
            return errors.DeadlineExceeded(message or "the deadline passed")
        case EndReason.DRAINED:
            return errors.Draining(message or "the worker is stopping")
        case EndReason.PEER_LOST:
            return errors.PeerLost(message or "the worker is gone")
        case EndReason.REJECTED if ended.overloaded:
            return errors.Overloaded(message or "the worker is overloaded")
        case EndReason.REJECTED:
            return errors.InvalidRequest(message or "refused", field=ended.field_name)
        case EndReason.FAILED:
            return errors.TandemError(message or "the worker failed")


def ended_from_error(request_id: int, error: errors.TandemError) -> Ended:
    """Return the end of a request that `error` ended; the inverse of `ended_error`."""
    reasons: tuple[tuple[type[errors.TandemError], EndReason], ...] = (
        (errors.Cancelled, EndReason.CANCELLED),
        (errors.DeadlineExceeded, EndReason.DEADLINE),
        (errors.PeerLost, EndReason.PEER_LOST),
        (errors.Unavailable, EndReason.DRAINED),
        (errors.Overloaded, EndReason.REJECTED),
        (errors.InvalidRequest, EndReason.REJECTED),
    )
    return Ended(
        request_id=request_id,
        reason=next((reason for kind, reason in reasons if isinstance(error, kind)), EndReason.FAILED),
        message=error.message,
        field_name=error.field if isinstance(error, errors.InvalidRequest) else "",
        overloaded=isinstance(error, errors.Overloaded),
    )

"""The Handoff stream on the wire: core.messages.handoff values to protobuf and back, for both ends.

`*_from_proto` parses what a peer sent, with limits, and raises InvalidRequest. What depends on the model (vocabulary,
lengths) is left to the caller. How a stream ends is in `handoff_status`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.core.messages.handoff import (
    Accepted,
    Announce,
    Complete,
    FirstToken,
    Open,
    RankEndpoint,
    RankPages,
    ReleaseReason,
    Sharding,
)
from tandem.core.token_ids import BYTES_PER_TOKEN
from tandem.errors import InvalidRequest
from tandem.rpc.convert_sampling import (
    duration_from_proto,
    duration_to_proto,
    logprob_to_proto,
    logprobs_from_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from tandem.rpc.gen.handoff.v1 import handoff_service_pb2 as handoff_pb2
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as inference_pb2

ID_BYTES = 16
MAX_NAMES = 16  # transports or checksums that one side offers
MAX_NAME_CHARS = 64
MAX_SALT_CHARS = 256
MAX_ADAPTER_CHARS = 128
MAX_FINGERPRINT_CHARS = 512
MAX_RANKS = 1024  # exporting ranks of one worker, over every transport
MAX_PAGES = 1 << 20  # in one announcement
MAX_TOKEN_BYTES = 64
_CHECKSUM_BYTES = 8
_PAGE_NUMBER_BYTES = 4

_REASONS = {
    ReleaseReason.DONE: handoff_pb2.Release.REASON_DONE,
    ReleaseReason.ABANDONED: handoff_pb2.Release.REASON_ABANDONED,
    ReleaseReason.LOCAL: handoff_pb2.Release.REASON_LOCAL,
}
_REASONS_BY_NUMBER = {int(number): reason for reason, number in _REASONS.items()}

Response = Accepted | Announce | FirstToken | Complete


# ---- decode -> prefill --------------------------------------------------------------------------------------------


def open_to_proto(opened: Open, traceparent: str = "") -> handoff_pb2.HandoffRequest:
    """Return the first message of a stream. `timeout_seconds` is not in it: it travels as the stream's deadline."""
    sampling, stop, output = sampling_to_proto(opened.sampling)
    return handoff_pb2.HandoffRequest(
        open=handoff_pb2.Open(
            handoff_id=opened.handoff_id,
            attempt=opened.attempt,
            importer_instance_id=opened.importer_instance_id,
            prompt_token_ids=opened.prompt_token_ids,
            output_tokens=opened.output_tokens,
            sampling=sampling,
            stop=stop,
            output=output,
            tokens_held=opened.tokens_held,
            fingerprint=opened.fingerprint,
            numerics=opened.numerics,
            importer=_sharding_to_proto(opened.sharding),
            priority=opened.priority,
            cache_salt=opened.cache_salt,
            lora_adapter=opened.adapter,
            lora_digest=opened.adapter_digest,
            transports=opened.transports,
            checksums=opened.checksums,
            traceparent=traceparent,
        )
    )


def open_from_proto(message: handoff_pb2.Open, timeout_seconds: float | None) -> Open:
    """Return what an importer opens; `timeout_seconds` is what is left of its deadline."""
    _exactly("handoff_id", message.handoff_id, ID_BYTES)
    _exactly("importer_instance_id", message.importer_instance_id, ID_BYTES)
    num_tokens = _packed("prompt_token_ids", message.prompt_token_ids, BYTES_PER_TOKEN)
    if not num_tokens:
        raise InvalidRequest("the prompt is empty", field="prompt_token_ids")
    if not message.output_tokens < num_tokens:
        raise InvalidRequest("output_tokens leaves no prompt", field="output_tokens")
    if not message.tokens_held < num_tokens:
        raise InvalidRequest("tokens_held must be fewer than the prompt has", field="tokens_held")
    if message.sampling.WhichOneof("constraint"):
        raise InvalidRequest("constrained output is not supported", field="sampling", reason="UNSUPPORTED")
    return Open(
        handoff_id=message.handoff_id,
        attempt=message.attempt,
        importer_instance_id=message.importer_instance_id,
        prompt_token_ids=message.prompt_token_ids,
        output_tokens=message.output_tokens,
        sampling=sampling_from_proto(message.sampling, message.stop, message.output),
        tokens_held=message.tokens_held,
        fingerprint=_text("fingerprint", message.fingerprint, MAX_FINGERPRINT_CHARS),
        numerics=_text("numerics", message.numerics, MAX_FINGERPRINT_CHARS),
        sharding=_sharding_from_proto(message.importer),
        priority=message.priority,
        cache_salt=_text("cache_salt", message.cache_salt, MAX_SALT_CHARS),
        adapter=_text("lora_adapter", message.lora_adapter, MAX_ADAPTER_CHARS),
        adapter_digest=_text("lora_digest", message.lora_digest, MAX_ADAPTER_CHARS),
        transports=_names("transports", message.transports),
        checksums=_names("checksums", message.checksums),
        timeout_seconds=timeout_seconds,
    )


def release_to_proto(reason: ReleaseReason) -> handoff_pb2.HandoffRequest:
    """Return the last message of an importer."""
    return handoff_pb2.HandoffRequest(release=handoff_pb2.Release(reason=_REASONS[reason]))


def release_from_proto(message: handoff_pb2.Release) -> ReleaseReason:
    """Return why an importer lets go; a reason of a later version counts as DONE: it is a release all the same."""
    return _REASONS_BY_NUMBER.get(message.reason, ReleaseReason.DONE)


# ---- prefill -> decode --------------------------------------------------------------------------------------------


def response_to_proto(response: Response) -> handoff_pb2.HandoffResponse:
    """Return one message of an exporter."""
    match response:
        case Accepted():
            return handoff_pb2.HandoffResponse(accepted=_accepted_to_proto(response))
        case Announce(first_ordinal, tokens_ready, ranks):
            pages = [handoff_pb2.RankPages(checksums=r.checksums, page_numbers=r.page_numbers) for r in ranks]
            announce = handoff_pb2.Announce(first_ordinal=first_ordinal, tokens_ready=tokens_ready, ranks=pages)
            return handoff_pb2.HandoffResponse(announce=announce)
        case FirstToken():
            first_token = handoff_pb2.FirstToken(
                token_id=response.token_id,
                logprobs=[logprob_to_proto(response.logprob)] if response.logprob is not None else [],
                prompt_logprobs=[logprob_to_proto(value) for value in response.prompt_logprobs],
                cached_tokens=response.cached_tokens,
                timing=_prefill_timing(response),
            )
            return handoff_pb2.HandoffResponse(first_token=first_token)
        case Complete():
            return handoff_pb2.HandoffResponse(complete=handoff_pb2.Complete(timing=_prefill_timing(response)))


def response_from_proto(message: handoff_pb2.HandoffResponse) -> Response:
    """Return one message of an exporter; raises InvalidRequest also for one that this version does not know."""
    match message.WhichOneof("event"):
        case "accepted":
            return _accepted_from_proto(message.accepted)
        case "announce":
            return _announce_from_proto(message.announce)
        case "first_token":
            logprobs = logprobs_from_proto(message.first_token.logprobs)
            return FirstToken(
                token_id=message.first_token.token_id,
                logprob=logprobs[0] if logprobs else None,
                prompt_logprobs=logprobs_from_proto(message.first_token.prompt_logprobs),
                cached_tokens=message.first_token.cached_tokens,
                queue_seconds=duration_from_proto(message.first_token.timing.queue),
                prefill_seconds=duration_from_proto(message.first_token.timing.prefill),
            )
        case "complete":
            return Complete(
                queue_seconds=duration_from_proto(message.complete.timing.queue),
                prefill_seconds=duration_from_proto(message.complete.timing.prefill),
            )
        case _:
            raise InvalidRequest("an event that this version does not know", field="event")


def _prefill_timing(response: FirstToken | Complete) -> inference_pb2.Timing:
    return inference_pb2.Timing(
        queue=duration_to_proto(response.queue_seconds), prefill=duration_to_proto(response.prefill_seconds)
    )


def _accepted_to_proto(accepted: Accepted) -> handoff_pb2.Accepted:
    return handoff_pb2.Accepted(
        handoff_token=accepted.handoff_token,
        endpoints=[
            handoff_pb2.RankEndpoint(
                tensor_rank=endpoint.tensor_rank,
                pipeline_rank=endpoint.pipeline_rank,
                transport=endpoint.transport,
                address=endpoint.address,
                instance_id=endpoint.instance_id,
            )
            for endpoint in accepted.endpoints
        ],
        exporter=_sharding_to_proto(accepted.sharding),
        numerics=accepted.numerics,
        checksum=accepted.checksum,
        lease=duration_to_proto(accepted.lease_seconds),
    )


def _accepted_from_proto(message: handoff_pb2.Accepted) -> Accepted:
    if not 0 < len(message.endpoints) <= MAX_RANKS:
        raise InvalidRequest(f"{len(message.endpoints)} endpoints, must be 1 to {MAX_RANKS}", field="endpoints")
    if len(message.handoff_token) > MAX_TOKEN_BYTES:
        raise InvalidRequest(f"a token of {len(message.handoff_token)} bytes", field="handoff_token")
    return Accepted(
        handoff_token=message.handoff_token,
        endpoints=tuple(_endpoint_from_proto(endpoint) for endpoint in message.endpoints),
        sharding=_sharding_from_proto(message.exporter),
        numerics=_text("numerics", message.numerics, MAX_FINGERPRINT_CHARS),
        checksum=_text("checksum", message.checksum, MAX_NAME_CHARS),
        lease_seconds=duration_from_proto(message.lease),
    )


def _endpoint_from_proto(message: handoff_pb2.RankEndpoint) -> RankEndpoint:
    _exactly("endpoints.instance_id", message.instance_id, ID_BYTES)
    return RankEndpoint(
        transport=_text("endpoints.transport", message.transport, MAX_NAME_CHARS),
        address=_text("endpoints.address", message.address, MAX_SALT_CHARS),
        instance_id=message.instance_id,
        tensor_rank=message.tensor_rank,
        pipeline_rank=message.pipeline_rank,
    )


def _announce_from_proto(message: handoff_pb2.Announce) -> Announce:
    if not 0 < len(message.ranks) <= MAX_RANKS:
        raise InvalidRequest(f"pages of {len(message.ranks)} ranks, must be 1 to {MAX_RANKS}", field="ranks")
    counts = set()
    for rank in message.ranks:
        num_pages = _packed("checksums", rank.checksums, _CHECKSUM_BYTES)
        numbers = _packed("page_numbers", rank.page_numbers, _PAGE_NUMBER_BYTES)
        if not num_pages <= MAX_PAGES or numbers not in (0, num_pages):
            raise InvalidRequest(f"{num_pages} checksums, {numbers} page numbers", field="ranks")
        counts.add(num_pages)
    if len(counts) != 1:
        raise InvalidRequest("ranks announce different numbers of pages", field="ranks")
    ranks = tuple(RankPages(rank.checksums, rank.page_numbers) for rank in message.ranks)
    return Announce(message.first_ordinal, message.tokens_ready, ranks)


# ---- parts --------------------------------------------------------------------------------------------------------


def _sharding_to_proto(sharding: Sharding) -> handoff_pb2.Sharding:
    return handoff_pb2.Sharding(tensor_size=sharding.tensor_size, pipeline_size=sharding.pipeline_size)


def _sharding_from_proto(message: handoff_pb2.Sharding) -> Sharding:
    if not (message.tensor_size <= MAX_RANKS and message.pipeline_size <= MAX_RANKS):
        raise InvalidRequest(f"sharding above {MAX_RANKS}", field="sharding")
    return Sharding(max(1, message.tensor_size), max(1, message.pipeline_size))


def _exactly(field: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise InvalidRequest(f"{field} has {len(value)} bytes, must have {size}", field=field)


def _packed(field: str, value: bytes, item_bytes: int) -> int:
    count, rest = divmod(len(value), item_bytes)
    if rest:
        raise InvalidRequest(f"{field} is not a whole number of {item_bytes}-byte items", field=field)
    return count


def _text(field: str, value: str, max_chars: int) -> str:
    if len(value) > max_chars:
        raise InvalidRequest(f"{field} is longer than {max_chars} characters", field=field)
    return value


def _names(field: str, values: Sequence[str]) -> tuple[str, ...]:
    if len(values) > MAX_NAMES:
        raise InvalidRequest(f"{len(values)} {field}, at most {MAX_NAMES}", field=field)
    return tuple(_text(field, value, MAX_NAME_CHARS) for value in values)

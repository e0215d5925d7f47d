"""The Handoff stream as events and effects. The frontend owns the gRPC streams; the scheduler owns what they mean.

Decode's outgoing streams are numbered by decode's scheduler, prefill's incoming ones by prefill's frontend.
The rules are docs/architecture.md section 2; the wire form is proto/tandem/handoff/v1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tandem.core.messages.sampling import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Sharding:
    tensor_size: int = 1
    pipeline_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Create or attach. The same tokens in every attempt of a `handoff_id`."""

    handoff_id: bytes
    attempt: int  # gateway's count << 32 | decode's count
    importer_instance_id: bytes
    prompt_token_ids: bytes  # packed; output of a resumed request appended
    output_tokens: int  # how many of them are output already
    sampling: SamplingParams
    tokens_held: int  # page-aligned, fewer than the prompt
    fingerprint: str
    numerics: str
    sharding: Sharding
    transports: tuple[str, ...]  # what the importer can use, best first
    checksums: tuple[str, ...]
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""  # name of the LoRA adapter, for people; empty: none
    adapter_digest: str = ""  # what the exporter must have
    timeout_seconds: float | None = None  # travels as the stream's gRPC deadline


class ReleaseReason(Enum):
    DONE = "done"  # verified on all importing ranks, or not needed
    ABANDONED = "abandoned"  # cancelled, deadline
    LOCAL = "local"  # decode computes the prompt itself


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEndpoint:
    """Where one exporting rank's transfer process serves. `instance_id` is of that process, not of the worker."""

    transport: str
    address: str  # host:port (TCP), or the transport's own session name
    instance_id: bytes
    tensor_rank: int = 0
    pipeline_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    handoff_token: bytes
    endpoints: tuple[RankEndpoint, ...]  # of every exporting rank, one a transport
    sharding: Sharding
    numerics: str
    checksum: str
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class RankPages:
    """One piece of the announced pages: what one importing rank reads from one exporting rank."""

    checksums: bytes  # packed little-endian uint64, one a page
    page_numbers: bytes  # packed little-endian uint32; one-sided transports only, and only in the first piece


@dataclass(frozen=True, slots=True)
class Announce:
    """Pages [first_ordinal, first_ordinal + n) are final and readable on all ranks; n is the checksums of each piece.

    `ranks` has one entry a piece, in the order of core/sharding.py: by exporting rank, then by importing rank.
    """

    first_ordinal: int
    tokens_ready: int
    ranks: tuple[RankPages, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    token_id: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    queue_seconds: float = 0.0  # of the prompt, on the exporter
    prefill_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """Everything is announced."""

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0


class EndCode(Enum):
    """How the exporter ends a stream."""

    OK = "ok"  # after Release: every announced page was pinned until now
    INVALID = "invalid"  # the importer or its request is at fault; trying here again does not help
    MISMATCH = "mismatch"  # fingerprints differ: this pair can never hand over
    STALE_ATTEMPT = "stale_attempt"  # the attempt is not higher than the highest seen, or the id has ended
    SUPERSEDED = "superseded"  # a higher attempt took over
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    DEADLINE = "deadline"
    LOST = "lost"  # the exporter's transfer process restarted, the lease was taken back, or the compute failed


# ---- decode: effects ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenStream:
    stream_id: int
    address: str
    instance_id: bytes
    open: Open


@dataclass(frozen=True, slots=True)
class SendRelease:
    """Send Release, await the peer's status in the background, close. No further event comes from this stream."""

    stream_id: int
    reason: ReleaseReason


@dataclass(frozen=True, slots=True)
class DropStream:
    """End the stream without a Release: the peer starts its lease. No further event comes from this stream."""

    stream_id: int


# ---- decode: events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamAccepted:
    stream_id: int
    accepted: Accepted


@dataclass(frozen=True, slots=True)
class StreamAnnounced:
    stream_id: int
    announce: Announce


@dataclass(frozen=True, slots=True)
class StreamFirstToken:
    stream_id: int
    first_token: FirstToken


@dataclass(frozen=True, slots=True)
class StreamCompleted:
    stream_id: int
    complete: Complete


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """The peer or the network ended the stream. The last event of a stream."""

    stream_id: int
    code: EndCode
    message: str = ""


# ---- prefill: events ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenReceived:
    stream_id: int
    open: Open


@dataclass(frozen=True, slots=True)
class ReleaseReceived:
    stream_id: int
    reason: ReleaseReason


@dataclass(frozen=True, slots=True)
class StreamLost:
    """The stream ended without a Release, however: EOF, cancel, reset, keepalive. The last event of a stream."""

    stream_id: int


# ---- prefill: effects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendAccepted:
    stream_id: int
    accepted: Accepted


@dataclass(frozen=True, slots=True)
class SendAnnounce:
    stream_id: int
    announce: Announce


@dataclass(frozen=True, slots=True)
class SendFirstToken:
    stream_id: int
    first_token: FirstToken


@dataclass(frozen=True, slots=True)
class SendComplete:
    stream_id: int
    complete: Complete


@dataclass(frozen=True, slots=True)
class EndStream:
    """End the stream with a status. The frontend sends no StreamLost for it afterwards."""

    stream_id: int
    code: EndCode
    message: str = ""

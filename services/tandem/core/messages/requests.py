"""What a worker's frontend and its rank 0 say to each other about client requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tandem.core.messages.sampling import SamplingParams, TokenLogprob


class EndReason(Enum):
    """Why a request ended. Each request ends exactly once, with exactly one of these, on every pod that knows it."""

    STOP = "stop"  # an EOS or stop token was sampled, or the gateway matched a stop string
    LENGTH = "length"  # max_tokens or the context length
    HANDED_OFF = "handed_off"  # prefill only: decode released the hand-off as done
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    DRAINED = "drained"
    PEER_LOST = "peer_lost"  # prefill: the lease passed unreleased
    REJECTED = "rejected"  # refused at the border; nothing was computed
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPeer:
    """One prefill worker that the gateway names for a request, in order of preference."""

    address: str  # host:port of its HandoffService
    instance_id: bytes  # 16 bytes: the process life that the gateway saw
    handoff_id: bytes  # 16 random bytes
    attempt: int  # the gateway's count; the high 32 bits of Open.attempt
    output_tokens: int = 0  # outputs that the id's first Open carried


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A client's request enters this worker. `request_id` is unique in the life of the worker."""

    request_id: int
    prompt_token_ids: bytes  # packed little-endian uint32
    sampling: SamplingParams
    output_token_ids: bytes = b""  # resumed request: what the client has already, packed; counts as output
    peers: tuple[PrefillPeer, ...] = ()
    timeout_seconds: float | None = None
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""  # name of a LoRA adapter; empty: the model as it is
    adapter_digest: str = ""  # the one that the gateway means by that name; empty: whichever this worker has


class CancelCause(Enum):
    CLIENT = "client"  # end CANCELLED, release the hand-off as abandoned
    STOP_STRING = "stop_string"  # end STOP: the gateway matched a stop string
    SESSION_LOST = "session_lost"  # end CANCELLED at once; the hand-off stream is left to its lease


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request at once. Unknown and ended ids are ignored."""

    request_id: int
    cause: CancelCause = CancelCause.CLIENT


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new work, finish old; the scheduler is `finished` once nothing is left. `grace_seconds` None: no bound.

    With a bound, a decode or unified worker hands back (DRAINED) what it has not begun at once, and at the bound what
    has not ended. A second Drain with less grace hurries.
    """

    grace_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """New output of one request. `first_index` is the absolute output index of `token_ids[0]`."""

    request_id: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds that a request spent in each phase, and the KV that it received."""

    queue_seconds: float = 0.0  # until the worker that computed the prompt began with it
    prefill_seconds: float = 0.0  # the prompt's computation, by whoever computed it
    transfer_seconds: float = 0.0  # first pull to last verified page
    first_decode_seconds: float = 0.0  # from when decoding could begin to the second token
    decode_seconds: float = 0.0
    transfer_bytes: int = 0
    transport: str = ""  # what moved the KV; empty: computed here
    prefill_worker: str = ""  # address of the prefill peer that computed the prompt; empty: computed here


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last message about a request. `message` explains REJECTED and FAILED, in the client's words."""

    request_id: int
    reason: EndReason
    stop_token_id: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens not computed anew on any worker
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of a request without output (max_tokens == 0)
    timing: Timing = field(default_factory=Timing)
    message: str = ""
    field_name: str = ""  # REJECTED: the request field at fault
    overloaded: bool = False  # REJECTED because a bound was reached: retryable

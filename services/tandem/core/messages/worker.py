"""What a worker's processes tell each other about the worker itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.stats import LoadSnapshot


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A LoRA adapter that a worker serves. `digest` says which weights it has, whatever it is called."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class AdaptersChanged:
    """Every adapter that the worker serves from now on. An event of its scheduler, and news for its gateways."""

    adapters: tuple[AdapterInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReady:
    """Rank 0 has loaded the model, sized the pool and passed its transfer self-test; it takes requests now.

    Of a worker with several replicas: pages, running requests and weights are sums, the bounds of a request are those
    of each replica.
    """

    role: str
    loop: str  # one of the nine names, e.g. overlap_decode
    model: str
    max_total_num_tokens: int  # pool size of a replica in tokens: what one request may fill
    max_req_input_len: int  # the longest prompt that this worker accepts
    max_context_tokens: int
    max_running_requests: int
    page_tokens: int
    num_pages: int
    page_bytes: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str  # model, revision, dtype, layout, page tokens, protocol
    numerics: str
    dtype: str
    operators: str
    weight_bytes: int
    pool_pages: str  # huge, advised or ordinary; mixed: not the same in all of its pools
    endpoints: tuple[RankEndpoint, ...]
    imports: tuple[str, ...]
    transport_notes: tuple[str, ...]
    startup_seconds: float = 0.0
    data_size: int = 1  # replicas behind one frontend
    adapters: tuple[AdapterInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class StartupProgress:
    """A step of the start, for people: `tandem up` and the log show it."""

    message: str


@dataclass(frozen=True, slots=True)
class RankFailed:
    """Rank 0 cannot go on. The frontend reports `message` and the worker exits with `exit_code`."""

    message: str
    exit_code: int = 1


@dataclass(frozen=True, slots=True)
class Stats:
    load: LoadSnapshot


WorkerState = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """What a worker tells a gateway about itself: the first message of a session, and again on every change."""

    worker_id: str  # stable name, for people
    instance_id: bytes  # random per process life; identity in sessions and hand-offs
    role: str
    state: WorkerState
    model: str
    fingerprint: str
    handoff_address: str = ""  # host:port of its HandoffService; prefill only
    numerics: str = ""
    loop: str = ""
    page_tokens: int = 0
    num_pages: int = 0
    max_running_requests: int = 0
    max_context_tokens: int = 0
    max_total_num_tokens: int = 0
    max_req_input_len: int = 0
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    transports: tuple[str, ...] = ()  # prefill: exports over; decode: can import over; best first
    transport_notes: tuple[str, ...] = ()
    dtype: str = ""
    operators: str = ""
    version: str = ""
    adapters: tuple[AdapterInfo, ...] = ()

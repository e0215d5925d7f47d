"""Every metric that the programs export: name, kind, labels, help. Dashboards and alerts may use no others.

Counters are listed without the `_total` that the exposition adds. Base units, bounded label sets: what a label may be
stands here as a tuple, and every such series is there from the start, so that rates and alerts see the first event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.core.messages.requests import EndReason
from tandem.core.stats import (
    BATCH_ROWS,
    BATCH_TOKENS,
    HANDOFF_FAILURES,
    NO_TRANSPORT,
    PULL_RESULTS,
    STEP_SECONDS,
    WAIT_SECONDS,
)

__all__ = ["HANDOFF_FAILURES", "NO_TRANSPORT", "PULL_RESULTS"]

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_DURATION = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


BUILD_INFO = Metric(
    name="tandem_build", kind="info", help="What this program is", labels=("program", "version", "python")
)

APIS = ("Generate", "Chat", "StreamGenerate", "StreamChat")
CODES = (
    "OK",
    "CANCELLED",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "ABORTED",
    "INTERNAL",
)
REQUESTS = Metric(
    name="tandem_gateway_requests",
    kind="counter",
    help="Requests that ended, by call and gRPC status",
    labels=("api", "code"),
)
FINISHES = ("stop", "length", "none")
FINISHED = Metric(
    name="tandem_gateway_finished",
    kind="counter",
    help="Requests that ended, by finish reason; none: without an answer, their gRPC status says why",
    labels=("reason",),
)
REQUEST_SECONDS = Metric(
    name="tandem_gateway_request_duration_seconds",
    kind="histogram",
    help="From a request's arrival to its end",
    labels=("api",),
    buckets=_DURATION,
)
TTFT_SECONDS = Metric(
    name="tandem_gateway_ttft_seconds",
    kind="histogram",
    help="From a request's arrival to its first token",
    labels=("api",),
    buckets=_TTFT,
)
TPOT_SECONDS = Metric(
    name="tandem_gateway_tpot_seconds",
    kind="histogram",
    help="Mean time between a request's output tokens",
    labels=("api",),
    buckets=_ITL,
)
ITL_SECONDS = Metric(
    name="tandem_gateway_itl_seconds",
    kind="histogram",
    help="Time between two arrivals of output for one request",
    labels=("api",),
    buckets=_ITL,
)
TOKEN_KINDS = ("prompt", "cached", "output")
TOKENS = Metric(
    name="tandem_gateway_tokens", kind="counter", help="Tokens of requests: prompt, cached, output", labels=("kind",)
)
INFLIGHT = Metric(name="tandem_gateway_inflight", kind="gauge", help="Answers that are being produced")
ROLES = ("prefill", "decode", "unified")
READY_WORKERS = Metric(
    name="tandem_gateway_ready_workers", kind="gauge", help="Workers that take requests", labels=("role",)
)
SESSION_STATES = ("up", "down", "refused")
SESSIONS = Metric(
    name="tandem_gateway_sessions",
    kind="gauge",
    help="Sessions to workers: up, down, or refused since the worker serves another model",
    labels=("state",),
)
DISCOVERY_REASONS = ("expired", "error", "dns")
DISCOVERY_RESTARTS = Metric(
    name="tandem_gateway_discovery_restarts",
    kind="counter",
    help="Times that discovery had to begin anew: its place in history expired, an error, a name not resolved",
    labels=("reason",),
)
LOOP_LAG = Metric(
    name="tandem_gateway_loop_lag_seconds", kind="gauge", help="How late the event loop is with its heartbeat"
)
RESUMPTION_CAUSES = ("worker_lost", "drained", "refused")
RESUMPTIONS = Metric(
    name="tandem_gateway_resumptions",
    kind="counter",
    help="Answers that went on at another worker, by cause: worker_lost, drained, refused",
    labels=("cause",),
)
RESUMPTION_BOUNDS = ("limit", "budget", "no_worker", "deadline")
RESUMPTIONS_REFUSED = Metric(
    name="tandem_gateway_resumptions_refused",
    kind="counter",
    help="Answers that needed another worker and got none, by reason: limit, budget, no_worker, deadline",
    labels=("reason",),
)
DRAIN_SECONDS = Metric(
    name="tandem_gateway_drain_seconds", kind="gauge", help="How long the gateway has been draining; 0: it is not"
)
DRAIN_LIMIT_SECONDS = Metric(
    name="tandem_gateway_drain_limit_seconds",
    kind="gauge",
    help="How long this drain may take until open streams are cut; 0: it is not draining",
)
GATEWAY_METRICS = (
    BUILD_INFO,
    REQUESTS,
    FINISHED,
    REQUEST_SECONDS,
    TTFT_SECONDS,
    TPOT_SECONDS,
    ITL_SECONDS,
    TOKENS,
    INFLIGHT,
    READY_WORKERS,
    SESSIONS,
    DISCOVERY_RESTARTS,
    LOOP_LAG,
    RESUMPTIONS,
    RESUMPTIONS_REFUSED,
    DRAIN_SECONDS,
    DRAIN_LIMIT_SECONDS,
)

# The OpenTelemetry GenAI server metrics, as their exporter to Prometheus would name them; telemetry.genai_metrics.
_GENAI_LABELS = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "gen_ai_response_model",
)
GENAI_REQUEST_DURATION = Metric(
    name="gen_ai_server_request_duration_seconds",
    kind="histogram",
    help="Generative AI server request duration",
    labels=(*_GENAI_LABELS, "error_type"),
    buckets=tuple(0.01 * 2**n for n in range(14)),
)
GENAI_TTFT = Metric(
    name="gen_ai_server_time_to_first_token_seconds",
    kind="histogram",
    help="Time to generate first token for successful responses",
    labels=_GENAI_LABELS,
    buckets=(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
GENAI_TPOT = Metric(
    name="gen_ai_server_time_per_output_token_seconds",
    kind="histogram",
    help="Time per output token generated after the first token for successful responses",
    labels=_GENAI_LABELS,
    buckets=(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
)
GENAI_METRICS = (GENAI_REQUEST_DURATION, GENAI_TTFT, GENAI_TPOT)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=f"tandem_worker_{name}", kind="gauge", help=help, labels=("role", *labels))


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=f"tandem_worker_{name}", kind="counter", help=help, labels=("role", *labels))


def _histogram(name: str, help: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=f"tandem_worker_{name}", kind="histogram", help=help, labels=("role",), buckets=buckets)


# By the field of LoadSnapshot that they show.
WORKER_LOAD_METRICS: dict[str, Metric] = {
    "running_requests": _gauge("running_requests", "Requests that hold pages"),
    "waiting_requests": _gauge("waiting_requests", "Requests that wait"),
    "waiting_uncached_tokens": _gauge("waiting_uncached_tokens", "Prompt tokens that wait to be computed"),
    "transfers_inflight": _gauge("transfers_inflight", "Decode: pulls; prefill: hand-offs announced, not released"),
    "transfers_waiting": _gauge("transfers_waiting", "Hand-offs that wait for pages"),
    "leased_handoffs": _gauge("leased_handoffs", "Hand-offs whose stream ended without a release"),
    "orphaned_pages": _gauge("orphaned_pages", "Pages that nothing owns, found by the self-check"),
    "draining": _gauge("draining", "1 while the worker refuses new work"),
    "steps": _counter("steps", "Plans executed"),
    "device_seconds": _counter("device_seconds", "Time in which the device computed"),
    "device_idle_seconds": _counter("device_idle_seconds", "Time in which the loop had no plan at the device"),
    "computed_tokens": _counter("computed_tokens", "Tokens computed, prompt and output"),
    "generated_tokens": _counter("generated_tokens", "Output tokens"),
    "discarded_rows": _counter("discarded_rows", "Speculative rows whose result was not needed"),
    "retractions": _counter("retractions", "Requests that lost their pages to an older one"),
    "prefix_hit_tokens": _counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    "prefix_query_tokens": _counter("prefix_query_tokens", "Prompt tokens looked up in the prefix cache"),
    "first_token_differences": _counter("first_token_differences", "First tokens that a later prefill drew otherwise"),
    "transfer_fallbacks": _counter("transfer_fallbacks", "Pairs that fell back to another transport"),
    "local_prefills": _counter("local_prefills", "Prompts computed on decode because every named peer failed"),
    "leases_started": _counter("leases_started", "Hand-off streams that ended without a release"),
    "leases_expired": _counter("leases_expired", "Leases that nobody attached to"),
    "self_check_faults": _counter("self_check_faults", "Faults in the books of pages, found by the self-check"),
}
WORKER_HISTOGRAMS: dict[str, Metric] = {
    "queue_seconds": _histogram(
        "queue_seconds",
        "Wait for pages and a slot: of a prompt, or on decode of a hand-off that was announced",
        WAIT_SECONDS,
    ),
    "prefill_seconds": _histogram("prefill_seconds", "Computation of a prompt, from its first row on", WAIT_SECONDS),
    "handoff_seconds": _histogram(
        "handoff_seconds", "Decode: a hand-off's first read to its last verified page", WAIT_SECONDS
    ),
    "handoff_stall_seconds": _histogram(
        "handoff_stall_seconds", "Decode: from the first token, sent at once, to the last verified page", WAIT_SECONDS
    ),
    "first_decode_seconds": _histogram(
        "first_decode_seconds", "From when decoding could begin to the second token", WAIT_SECONDS
    ),
    "step_seconds": _histogram(
        "step_seconds", "A plan's launch, or the end of the plan before it, to its result", STEP_SECONDS
    ),
    "batch_requests": _histogram("batch_requests", "Requests of a plan", BATCH_ROWS),
    "batch_tokens": _histogram("batch_tokens", "Tokens of a plan", BATCH_TOKENS),
}
END_REASONS = tuple(reason.value for reason in EndReason)
ENDED_REQUESTS = _counter("ended_requests", "Requests that ended on this worker, by reason", "reason")
PAGE_STATES = ("free", "held", "cached", "quarantined")
PAGES = _gauge("pages", "KV pages by state", "state")
KV_USAGE = _gauge("kv_usage_ratio", "Share of the KV pages that is neither free nor evictable")
FENCED_PEERS = _gauge("fenced_peers", "Peers that this worker does not pair with for now")
# Decode: by transport; `none` where an attempt failed before one was chosen.
PULLS = _counter("pulls", "Reads of KV pages that ended, by result", "transport", "result")
TRANSFERRED_BYTES = _counter("transferred_bytes", "KV bytes pulled", "transport")
TRANSFER_SECONDS = _counter("transfer_seconds", "Time spent pulling, summed over pulls", "transport")
CHECKSUM_MISMATCHES = _counter(
    "checksum_mismatches", "Pages that arrived different from what was announced", "transport"
)
HANDOFF_FAILED = _counter(
    "handoff_failures", "Attempts to receive a hand-off that failed, by reason", "transport", "reason"
)
# Decode: by the address of the prefill peer; 32 at most, `other` sums the rest.
PEER_LANDED = _counter("peer_handoffs", "Hand-offs whose pages all arrived, by prefill peer", "peer")
PEER_FAILED = _counter("peer_handoff_failures", "Attempts to receive a hand-off that failed, by prefill peer", "peer")
PEER_BYTES = _counter("peer_transferred_bytes", "KV bytes pulled, by prefill peer", "peer")
PEER_NUMERICS = _gauge(
    "peer_numerics_differ",
    "1: this prefill peer computes with other bits; its pages serve their request and are not cached",
    "peer",
)
WORKER_INFO = Metric(
    name="tandem_worker", kind="info", help="What this worker runs, and what its KV pool lies in", labels=("role",)
)
TRANSPORT = _gauge("transport", "1 for each transport that can be used, in order of preference", "transport", "rank")
# By replica (parallel.data_size, 64 at most), which is "0" where there is one; by the field of LoadSnapshot.
REPLICA_LOAD_METRICS: dict[str, Metric] = {
    "running_requests": _gauge("replica_running_requests", "Requests that hold pages, by replica", "replica"),
    "waiting_requests": _gauge("replica_waiting_requests", "Requests that wait, by replica", "replica"),
    "waiting_uncached_tokens": _gauge(
        "replica_waiting_uncached_tokens", "Prompt tokens that wait to be computed, by replica", "replica"
    ),
    "computed_tokens": _counter("replica_computed_tokens", "Tokens computed, prompt and output, by replica", "replica"),
    "generated_tokens": _counter("replica_generated_tokens", "Output tokens, by replica", "replica"),
    "prefix_hit_tokens": _counter(
        "replica_prefix_hit_tokens", "Prompt tokens found in the prefix cache, by replica", "replica"
    ),
}
REPLICA_PAGES = _gauge("replica_pages", "KV pages by replica and state", "replica", "state")
REPLICA_SILENT = _gauge(
    "replica_loop_silent_seconds", "Since the event loop of a replica's rank 0 was heard of; 5 when idle", "replica"
)
REPLICAS = _gauge("replicas", "Replicas of the model in this worker; sums of device time are over all of them")
# By the field of WorkerVitals that they show.
WORKER_VITALS: dict[str, Metric] = {
    "loop_silent_seconds": _gauge(
        "loop_silent_seconds", "Since the event loop was heard of that was silent for longest; 5 when idle"
    ),
    "frontend_lag_seconds": _gauge("frontend_lag_seconds", "How late the frontend's event loop is with its heartbeat"),
    "sessions": _gauge("sessions", "Sessions of gateways"),
    "drain_seconds": _gauge("drain_seconds", "How long the worker has been draining; 0: it is not"),
    "drain_limit_seconds": _gauge(
        "drain_limit_seconds", "How long this drain may take until the rest is cut; 0: it is not draining"
    ),
}
WORKER_METRICS = (
    *WORKER_LOAD_METRICS.values(),
    *WORKER_HISTOGRAMS.values(),
    *WORKER_VITALS.values(),
    *REPLICA_LOAD_METRICS.values(),
    REPLICA_PAGES,
    REPLICA_SILENT,
    REPLICAS,
    BUILD_INFO,
    ENDED_REQUESTS,
    PAGES,
    KV_USAGE,
    FENCED_PEERS,
    WORKER_INFO,
    TRANSPORT,
)
DECODE_METRICS = (
    PULLS,
    TRANSFERRED_BYTES,
    TRANSFER_SECONDS,
    CHECKSUM_MISMATCHES,
    HANDOFF_FAILED,
    PEER_LANDED,
    PEER_FAILED,
    PEER_BYTES,
    PEER_NUMERICS,
)

# The Gateway API model-server contract, by the names that its endpoint picker looks for; telemetry.vllm_metrics.
VLLM_WAITING = Metric(name="vllm:num_requests_waiting", kind="gauge", help="Requests that wait", labels=("model_name",))
VLLM_RUNNING = Metric(
    name="vllm:num_requests_running", kind="gauge", help="Requests that hold pages", labels=("model_name",)
)
VLLM_KV_USAGE = Metric(
    name="vllm:kv_cache_usage_perc", kind="gauge", help="Share of the KV pages in use, 0 to 1", labels=("model_name",)
)
VLLM_CACHE = Metric(
    name="vllm:cache_config_info",
    kind="gauge",
    help="Size of the KV pool, as labels",
    labels=("model_name", "block_size", "num_gpu_blocks"),
)
VLLM_METRICS = (VLLM_WAITING, VLLM_RUNNING, VLLM_KV_USAGE, VLLM_CACHE)
ALL_METRICS = tuple(dict.fromkeys((*GATEWAY_METRICS, *WORKER_METRICS, *DECODE_METRICS, *GENAI_METRICS, *VLLM_METRICS)))

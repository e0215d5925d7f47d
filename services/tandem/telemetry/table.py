"""Every metric that the programs export: name, kind, labels, help. Dashboards and alerts may use no others.

Counters are listed without the `_total` that the exposition adds. Base units, bounded label sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_DURATION = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REQUESTS = Metric(
    name="tandem_gateway_requests",
    kind="counter",
    help="Requests that ended, by call and gRPC status",
    labels=("api", "code"),
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
TOKENS = Metric(
    name="tandem_gateway_tokens", kind="counter", help="Tokens of requests: prompt, cached, output", labels=("kind",)
)
INFLIGHT = Metric(name="tandem_gateway_inflight", kind="gauge", help="Answers that are being produced")
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
RESUMPTIONS = Metric(
    name="tandem_gateway_resumptions",
    kind="counter",
    help="Answers that went on at another worker, by cause: worker_lost, drained, refused",
    labels=("cause",),
)
RESUMPTIONS_REFUSED = Metric(
    name="tandem_gateway_resumptions_refused",
    kind="counter",
    help="Answers that needed another worker and got none, by reason: limit, budget, no_worker, deadline",
    labels=("reason",),
)
GATEWAY_METRICS = (
    REQUESTS,
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
)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=f"tandem_worker_{name}", kind="gauge", help=help, labels=labels)


def _counter(name: str, help: str) -> Metric:
    return Metric(name=f"tandem_worker_{name}", kind="counter", help=help)


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
    "computed_tokens": _counter("computed_tokens", "Tokens computed, prompt and output"),
    "generated_tokens": _counter("generated_tokens", "Output tokens"),
    "discarded_rows": _counter("discarded_rows", "Speculative rows whose result was not needed"),
    "retractions": _counter("retractions", "Requests that lost their pages to an older one"),
    "prefix_hit_tokens": _counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    "prefix_query_tokens": _counter("prefix_query_tokens", "Prompt tokens looked up in the prefix cache"),
    "transferred_bytes": _counter("transferred_bytes", "KV bytes pulled"),
    "transfer_seconds": _counter("transfer_seconds", "Time spent pulling, summed over pulls"),
    "checksum_mismatches": _counter("checksum_mismatches", "Pages that arrived different from what was announced"),
    "failed_pulls": _counter("failed_pulls", "Pulls that failed or were refused"),
    "first_token_differences": _counter("first_token_differences", "First tokens that a later prefill drew otherwise"),
    "transfer_fallbacks": _counter("transfer_fallbacks", "Pairs that fell back to another transport"),
    "local_prefills": _counter("local_prefills", "Prompts computed on decode because every named peer failed"),
    "leases_started": _counter("leases_started", "Hand-off streams that ended without a release"),
    "leases_expired": _counter("leases_expired", "Leases that nobody attached to"),
}
PAGES = _gauge("pages", "KV pages by state", "state")
FENCED_PEERS = _gauge("fenced_peers", "Peers that this worker does not pair with for now")
WORKER_INFO = Metric(name="tandem_worker", kind="info", help="What this worker runs")
TRANSPORT = _gauge("transport", "1 for each transport that can be used, in order of preference", "transport", "rank")
WORKER_METRICS = (*WORKER_LOAD_METRICS.values(), PAGES, FENCED_PEERS, WORKER_INFO, TRANSPORT)

"""The gateway's metrics. Called once a request or once a frame, never once a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import InfoMetricFamily
from prometheus_client.registry import Collector

from tandem.telemetry import table
from tandem.telemetry.build import build_family
from tandem.telemetry.drain import DrainClock
from tandem.telemetry.genai import GenAiMetrics
from tandem.telemetry.table import Metric


class GatewayMetrics:
    """Counts into `registry`. What `watch` is given is asked for at every scrape."""

    def __init__(self, registry: CollectorRegistry, *, genai_model: str = "") -> None:
        """`genai_model`: the model's name, for the OpenTelemetry GenAI metrics as well; empty: without them."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside every counter, which nobody reads
        registry.register(_Build())
        self._genai = GenAiMetrics(registry, genai_model) if genai_model else None
        self._finished = _counter(table.FINISHED, registry)
        self._drain_seconds = _gauge(table.DRAIN_SECONDS, registry)
        self._drain_limit_seconds = _gauge(table.DRAIN_LIMIT_SECONDS, registry)
        self._requests = _counter(table.REQUESTS, registry)
        self._seconds = _histogram(table.REQUEST_SECONDS, registry)
        self._ttft = _histogram(table.TTFT_SECONDS, registry)
        self._tpot = _histogram(table.TPOT_SECONDS, registry)
        self._itl = _histogram(table.ITL_SECONDS, registry)
        self._tokens = _counter(table.TOKENS, registry)
        self._inflight = _gauge(table.INFLIGHT, registry)
        self._ready_workers = _gauge(table.READY_WORKERS, registry)
        self._resumptions = _counter(table.RESUMPTIONS, registry)
        self._resumptions_refused = _counter(table.RESUMPTIONS_REFUSED, registry)
        self._sessions = _gauge(table.SESSIONS, registry)
        self._discovery_restarts = _counter(table.DISCOVERY_RESTARTS, registry)
        self._loop_lag = _gauge(table.LOOP_LAG, registry)
        self._zero()
        self._output_tokens = self._tokens.labels("output")
        self._itl_by_api: dict[str, Histogram] = {}  # a labels() look-up costs as much as the observation

    def watch(
        self,
        *,
        inflight: Callable[[], int],
        ready_workers: Callable[[str], int],
        sessions: Callable[[str], int],
        loop_lag: Callable[[], float],
        drain: DrainClock,
    ) -> None:
        """Show what these return."""
        self._drain_seconds.set_function(drain.seconds)
        self._drain_limit_seconds.set_function(drain.limit_seconds)
        for state in table.SESSION_STATES:
            self._sessions.labels(state).set_function(partial(sessions, state))
        self._loop_lag.set_function(loop_lag)
        self._inflight.set_function(inflight)
        for role in table.ROLES:
            self._ready_workers.labels(role).set_function(partial(ready_workers, role))

    def first_output(self, api: str, seconds: float) -> None:
        self._ttft.labels(api).observe(seconds)

    def next_output(self, api: str, seconds: float) -> None:
        child = self._itl_by_api.get(api)
        if child is None:
            child = self._itl_by_api[api] = self._itl.labels(api)
        child.observe(seconds)

    def output_tokens(self, count: int) -> None:
        self._output_tokens.inc(count)

    def ended(
        self,
        api: str,
        code: str,
        seconds: float,
        *,
        ttft_seconds: float | None,
        tpot_seconds: float | None,
        finish: str,
    ) -> None:
        """A request is over; `tpot_seconds` if it had two tokens at least, `finish` one of the table's."""
        self._requests.labels(api, code).inc()
        self._finished.labels(finish).inc()
        if self._genai is not None:
            self._genai.ended(api, code, seconds, ttft_seconds=ttft_seconds, tpot_seconds=tpot_seconds)
        self._seconds.labels(api).observe(seconds)
        if tpot_seconds is not None:
            self._tpot.labels(api).observe(tpot_seconds)

    def resumed(self, cause: str) -> None:
        """An answer goes on at another worker; `cause` is one of the table's."""
        self._resumptions.labels(cause).inc()

    def resumption_refused(self, reason: str) -> None:
        """An answer needed another worker and got none; `reason` is one of the table's."""
        self._resumptions_refused.labels(reason).inc()

    def discovery_restarted(self, reason: str) -> None:
        """The known workers could not be renewed, or only by a new list; `reason` is one of the table's."""
        self._discovery_restarts.labels(reason).inc()

    def prompt(self, num_tokens: int, cached_tokens: int) -> None:
        self._tokens.labels("prompt").inc(num_tokens)
        self._tokens.labels("cached").inc(cached_tokens)

    def _zero(self) -> None:
        """Let every series be there from the start: a counter that appears with its first event shows no increase."""
        for api in table.APIS:
            for code in table.CODES:
                self._requests.labels(api, code)
            for histogram in (self._seconds, self._ttft, self._tpot, self._itl):
                histogram.labels(api)
        for counter, values in (
            (self._finished, table.FINISHES),
            (self._tokens, table.TOKEN_KINDS),
            (self._resumptions, table.RESUMPTION_CAUSES),
            (self._resumptions_refused, table.RESUMPTION_BOUNDS),
            (self._discovery_restarts, table.DISCOVERY_REASONS),
        ):
            for value in values:
                counter.labels(value)


class _Build(Collector):
    def collect(self) -> Iterable[InfoMetricFamily]:
        yield build_family("gateway")


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry)


def _histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)

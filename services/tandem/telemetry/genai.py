"""The OpenTelemetry GenAI server metrics in Prometheus' names (telemetry.genai_metrics). Once a request."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from tandem.telemetry import table
from tandem.telemetry.table import Metric

PROVIDER = "tandem"


class GenAiMetrics:
    """Counts into `registry`. One model is served, so the model that was asked for is the one that answered."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        self._duration = _histogram(table.GENAI_REQUEST_DURATION, registry)
        self._ttft = _histogram(table.GENAI_TTFT, registry)
        self._tpot = _histogram(table.GENAI_TPOT, registry)
        for api in table.APIS:
            self._duration.labels(*self._labels(api), "")
            self._ttft.labels(*self._labels(api))
            self._tpot.labels(*self._labels(api))

    def ended(
        self, api: str, code: str, seconds: float, *, ttft_seconds: float | None, tpot_seconds: float | None
    ) -> None:
        """A request is over. Times of tokens count only where it ended well, as the convention says."""
        labels = self._labels(api)
        self._duration.labels(*labels, "" if code == "OK" else code).observe(seconds)
        if code == "OK" and ttft_seconds is not None:
            self._ttft.labels(*labels).observe(ttft_seconds)
        if code == "OK" and tpot_seconds is not None:
            self._tpot.labels(*labels).observe(tpot_seconds)

    def _labels(self, api: str) -> tuple[str, str, str, str]:
        return ("chat" if api.endswith("Chat") else "text_completion", PROVIDER, self._model, self._model)


def _histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)

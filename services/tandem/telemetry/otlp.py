"""Spans to an OTLP/gRPC collector, by OpenTelemetry's batch processor: a bounded queue, and a thread of its own.

Imported only where traces are asked for. A collector that does not answer costs dropped spans and one line in the log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from tandem.errors import ConfigError
from tandem.telemetry.tracing import FinishedSpan

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON
except ImportError as error:
    raise ConfigError("telemetry.otlp_endpoint needs OpenTelemetry: pip install 'tandem-serve[otel]'") from error

QUEUE_SPANS = 4096  # more are dropped
BATCH_SPANS = 512
BATCH_SECONDS = 1.0
EXPORT_SECONDS = 5.0
CLOSE_SECONDS = 2.0
_KINDS = {"server": trace.SpanKind.SERVER, "client": trace.SpanKind.CLIENT, "internal": trace.SpanKind.INTERNAL}
_logger = logging.getLogger(__name__)


class OtlpExporter:
    """Takes finished spans from one thread; `export` never blocks."""

    def __init__(self, endpoint: str, *, service: str, instance: str, version: str) -> None:
        # What the library says of a collector that is away, it says again and again; `_Watched` says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._endpoint = endpoint
        self._ids = _GivenIds()
        resource = Resource.create(
            {"service.name": service, "service.instance.id": instance, "service.version": version}
        )
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, id_generator=self._ids, shutdown_on_exit=False
        )
        self._tracer = self._provider.get_tracer("tandem", version)

    def start(self) -> None:
        """Connect, and start the thread. Spans that end before are lost."""
        exporter = _Watched(OTLPSpanExporter(endpoint=self._endpoint, timeout=EXPORT_SECONDS), self._endpoint)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUE_SPANS,
                schedule_delay_millis=BATCH_SECONDS * 1000,
                max_export_batch_size=BATCH_SPANS,
            )
        )

    def export(self, span: FinishedSpan) -> None:
        """Queue a span; it is dropped if the queue is full."""
        self._ids.trace_id, self._ids.span_id = span.context.trace_id, span.context.span_id
        context = trace.set_span_in_context(trace.INVALID_SPAN)
        if span.parent is not None:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
            parent = trace.SpanContext(span.parent.trace_id, span.parent.span_id, is_remote=True, trace_flags=flags)
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        made = self._tracer.start_span(
            span.name,
            context=context,
            kind=_KINDS[span.kind],
            attributes=span.attributes,
            start_time=span.begin_ns,
        )
        if span.error:
            made.set_status(trace.Status(trace.StatusCode.ERROR, span.error))
        made.end(span.end_ns)

    def close(self) -> None:
        """Send what is queued; after CLOSE_SECONDS the rest is lost."""
        # The library's own limit is 30 s, too long for a pod that has to go.
        closing = threading.Thread(target=self._provider.shutdown, name="traces close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


class _GivenIds(IdGenerator):
    """Ids that were given away before the span is made: callees have them already."""

    trace_id = 0
    span_id = 0

    def generate_span_id(self) -> int:
        return self.span_id

    def generate_trace_id(self) -> int:
        return self.trace_id


class _Watched(SpanExporter):
    """Says once that spans are lost, and once that they arrive again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._num_lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._num_lost:
                _logger.info("traces: %s takes spans again, %d were lost", self._endpoint, self._num_lost)
            self._num_lost = 0
        else:
            if not self._num_lost:
                _logger.warning("traces: %s takes no spans; they are dropped until it does", self._endpoint)
            self._num_lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)

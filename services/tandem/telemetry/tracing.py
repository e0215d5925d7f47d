"""Traces: spans of one request across gateway, decode and prefill, tied together by W3C `traceparent`.

Off (`Tracer.off`) every call here does next to nothing, and a traceparent that came is passed on as it is. On, spans
go to an exporter with a queue and a thread of its own (`telemetry.otlp`, the only place that knows OpenTelemetry).
Attributes are ids, names of workers and sizes; never prompts, answers or error texts. `tracestate` is not passed on.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tandem.config import TelemetryConfig

Kind = Literal["server", "client", "internal"]
Attribute = str | int | float | bool

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACEPARENT_CHARS = 256
_SAMPLED = 1
_RATIO_BITS = 64


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span's place in a trace."""

    trace_id: int
    span_id: int
    sampled: bool

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.sampled):02x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSpan:
    """What is exported. Times are nanoseconds since 1970; `error` is a code, "" if it went well."""

    name: str
    kind: Kind
    context: TraceContext
    parent: TraceContext | None
    begin_ns: int
    end_ns: int
    attributes: dict[str, Attribute] = field(default_factory=dict)
    error: str = ""


Export = Callable[[FinishedSpan], None]


class Exporter(Protocol):
    """Where spans go. `export` never blocks, and drops what it cannot keep; `close` blocks for a short time."""

    def start(self) -> None: ...

    def export(self, span: FinishedSpan) -> None: ...

    def close(self) -> None: ...


def parse_traceparent(text: str) -> TraceContext | None:
    """Return what a peer sent, None if it is not a traceparent."""
    if len(text) > _MAX_TRACEPARENT_CHARS or (match := _TRACEPARENT.fullmatch(text)) is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & _SAMPLED))


class Span:
    """A span that has begun, or nothing that looks like one. What comes after `end` is ignored."""

    def __init__(
        self,
        export: Export | None,
        name: str = "",
        kind: Kind = "internal",
        context: TraceContext | None = None,
        parent: TraceContext | None = None,
        *,
        traceparent: str = "",
    ) -> None:
        """`traceparent`: what a span that is not recorded passes on."""
        self._export = export
        self._name = name
        self._kind = kind
        self._context = context
        self._parent = parent
        self._attributes: dict[str, Attribute] = {}
        self._began = time.monotonic_ns()
        self._began_ns = time.time_ns() if export is not None else 0
        self._ended_ns = 0
        self.traceparent = context.traceparent if context is not None else traceparent

    @property
    def is_recording(self) -> bool:
        """Whether it will be exported, and is not at its end."""
        return self._export is not None and not self._ended_ns

    @property
    def begin_ns(self) -> int:
        return self._began_ns

    def now_ns(self) -> int:
        """Return the time: as the clock was when the span began, and steady since then; not after its end."""
        return self._ended_ns or self._began_ns + time.monotonic_ns() - self._began

    def set(self, **attributes: Attribute) -> None:
        """Add attributes; names get the prefix `tandem.`, and so have nothing in common with anybody else's."""
        if self.is_recording:
            self._attributes |= {f"tandem.{name}": value for name, value in attributes.items()}

    def child(self, name: str, kind: Kind = "internal") -> Span:
        """Begin a span below this one."""
        if self._context is None or not self.is_recording:
            return Span(None, traceparent=self.traceparent)
        return Span(self._export, name, kind, _below(self._context), self._context)

    def phase(self, name: str, begin_ns: int, end_ns: int) -> None:
        """Add a span below this one that is over already; what lies outside of this one is cut off."""
        if self._export is None or self._context is None or not self.is_recording:
            return
        begin_ns, end_ns = max(begin_ns, self._began_ns), min(end_ns, self.now_ns())
        if begin_ns < end_ns:
            context = _below(self._context)
            finished = FinishedSpan(
                name=name, kind="internal", context=context, parent=self._context, begin_ns=begin_ns, end_ns=end_ns
            )
            self._export(finished)

    def end(self, error: str = "") -> None:
        """End it now. `error` is a code, never a text."""
        if self._export is None or self._context is None or self._ended_ns:
            return
        self._ended_ns = self.now_ns()
        finished = FinishedSpan(
            name=self._name,
            kind=self._kind,
            context=self._context,
            parent=self._parent,
            begin_ns=self._began_ns,
            end_ns=self._ended_ns,
            attributes=self._attributes,
            error=error,
        )
        self._export(finished)


class Tracer:
    """Begins spans where a request enters this program. Use it in one thread."""

    def __init__(self, exporter: Exporter | None, ratio: float = 0.0) -> None:
        """`ratio`: the share of requests without a trace of their own that get one."""
        self._exporter = exporter
        self._export = exporter.export if exporter is not None else None
        self._ratio = ratio

    @classmethod
    def off(cls) -> Tracer:
        """Return one that records nothing."""
        return cls(None)

    def enter(self, name: str, traceparent: str, *, may_begin_trace: bool = False) -> Span:
        """Begin the span of a request that came with `traceparent`, "" for none. Not sampled is not recorded."""
        if self._export is None:
            return Span(None, traceparent=traceparent)
        parent = parse_traceparent(traceparent)
        if parent is None:
            return self._begin_trace(name) if may_begin_trace else Span(None)
        if not parent.sampled:
            return Span(None, traceparent=parent.traceparent)
        return Span(self._export, name, "server", _below(parent), parent)

    def start(self) -> None:
        """Begin to send; it starts threads, so do it after the last fork."""
        if self._exporter is not None:
            self._exporter.start()

    def close(self) -> None:
        """Send what is left, for a short time; blocks. Harmless before `start`."""
        if self._exporter is not None:
            self._exporter.close()

    def _begin_trace(self, name: str) -> Span:
        trace_id = secrets.randbits(128) or 1
        is_chosen = trace_id & ((1 << _RATIO_BITS) - 1) < self._ratio * (1 << _RATIO_BITS)
        context = TraceContext(trace_id, secrets.randbits(64) or 1, is_chosen)
        return Span(self._export if is_chosen else None, name, "server", context)


def open_tracer(config: TelemetryConfig, *, service: str, instance: str, version: str) -> Tracer:
    """Return the tracer of a program, off without `telemetry.otlp_endpoint`. Raises ConfigError."""
    if not config.otlp_endpoint:
        return Tracer.off()
    from tandem.telemetry.otlp import OtlpExporter

    exporter = OtlpExporter(config.otlp_endpoint, service=service, instance=instance, version=version)
    return Tracer(exporter, config.trace_ratio)


def _below(parent: TraceContext) -> TraceContext:
    return TraceContext(parent.trace_id, secrets.randbits(64) or 1, parent.sampled)

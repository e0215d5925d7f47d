"""Spans and traceparents, and the exporter against a real collector: alive, dead, and coming back."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tandem.config import TelemetryConfig
from tandem.telemetry.tracing import FinishedSpan, Span, TraceContext, Tracer, open_tracer, parse_traceparent
from tests.fakes.collector import Collector

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Kept:
    """An exporter that keeps what it is given."""

    def __init__(self) -> None:
        self.spans: list[FinishedSpan] = []

    def start(self) -> None:
        """Nothing has to be started."""

    def export(self, span: FinishedSpan) -> None:
        self.spans.append(span)

    def close(self) -> None:
        """Nothing is left."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PARENT, TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)),
        (PARENT[:-1] + "0", TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, False)),
        (PARENT[:-2] + "03", TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)),
        ("cc" + PARENT[2:] + "-more", TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)),
        (PARENT + "-more", None),
        ("ff" + PARENT[2:], None),
        ("00-" + "0" * 32 + PARENT[35:], None),
        (PARENT[:36] + "0" * 16 + "-01", None),
        (PARENT.upper(), None),
        (PARENT + "\n", None),
        ("cc" + PARENT[2:] + "-" + "x" * 300, None),
        ("", None),
        ("hello", None),
    ],
)
def test_traceparents(text: str, expected: TraceContext | None) -> None:
    assert parse_traceparent(text) == expected
    if expected is not None:
        assert parse_traceparent(expected.traceparent) == expected


def test_off_passes_on_what_came() -> None:
    span = Tracer.off().enter("x", "anything", may_begin_trace=True)
    assert (span.traceparent, span.is_recording) == ("anything", False)
    assert span.child("y").traceparent == "anything"
    span.set(a=1)
    span.phase("z", 0, 1 << 62)
    span.end()


def test_a_span_below_a_clients() -> None:
    kept = Kept()
    span = Tracer(kept).enter("x", PARENT)
    below = span.child("y", "client")
    below.set(pages=3)
    below.end("lost")
    span.end()
    span.end("late")
    span.set(late=1)
    y, x = kept.spans
    assert x.parent == parse_traceparent(PARENT)
    assert (x.name, x.kind, x.error, x.attributes) == ("x", "server", "", {})
    assert (y.name, y.kind, y.error, y.attributes) == ("y", "client", "lost", {"tandem.pages": 3})
    assert y.parent == x.context == parse_traceparent(span.traceparent)
    assert y.context == parse_traceparent(below.traceparent)
    assert x.begin_ns <= y.begin_ns <= y.end_ns <= x.end_ns
    assert abs(x.end_ns - time.time_ns()) < 5e9


def test_phases_are_cut_to_their_span() -> None:
    kept = Kept()
    span = Tracer(kept).enter("x", PARENT)
    time.sleep(0.002)
    middle = span.now_ns()
    span.phase("all", 0, 1 << 62)
    span.phase("first", 0, middle)
    span.phase("none", middle, middle)
    span.phase("before", 0, span.begin_ns - 1)
    span.end()
    span.phase("late", 0, 1 << 62)
    assert [each.name for each in kept.spans] == ["all", "first", "x"]
    whole = kept.spans[-1]
    for each in kept.spans[:-1]:
        assert whole.begin_ns == each.begin_ns < each.end_ns <= whole.end_ns


def test_a_client_that_is_not_sampled_is_respected() -> None:
    kept = Kept()
    span = Tracer(kept, 1.0).enter("x", PARENT[:-1] + "0", may_begin_trace=True)
    assert (span.is_recording, span.traceparent) == (False, PARENT[:-1] + "0")
    span.end()
    assert not kept.spans


def test_only_a_gateway_begins_traces() -> None:
    kept = Kept()
    tracer = Tracer(kept, 1.0)
    assert tracer.enter("x", "broken").traceparent == ""
    root = tracer.enter("x", "broken", may_begin_trace=True)
    root.end()
    assert kept.spans[0].parent is None
    assert root.traceparent.endswith("-01")


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_share_of_traces_is_what_was_asked_for(ratio: float) -> None:
    kept = Kept()
    tracer = Tracer(kept, ratio)
    spans = [tracer.enter("x", "", may_begin_trace=True) for _ in range(4000)]
    for span in spans:
        span.end()
        assert span.traceparent[-2:] in ("00", "01")  # workers are told either way, and begin none of their own
    assert len(kept.spans) == pytest.approx(4000 * ratio, abs=200)
    assert len({span.context.trace_id for span in kept.spans}) == len(kept.spans)


def test_opentelemetry_is_not_imported_when_off() -> None:
    code = (
        "import sys, tandem.gateway.server, tandem.worker.main\n"
        "from tandem.config import TelemetryConfig\n"
        "from tandem.telemetry.tracing import open_tracer\n"
        "open_tracer(TelemetryConfig(), service='s', instance='i', version='v').start()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the exporter ---------------------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.telemetry.otlp.BATCH_SECONDS", 0.05)


def started(endpoint: str, ratio: float = 1.0) -> Tracer:
    config = TelemetryConfig(otlp_endpoint=endpoint, trace_ratio=ratio)
    tracer = open_tracer(config, service="tandem-test", instance="i-1", version="1.2")
    tracer.start()
    return tracer


def test_what_arrives_is_what_was_said(collector: Collector, quick: None) -> None:
    tracer = started(collector.endpoint)
    root = tracer.enter("root", "", may_begin_trace=True)
    server = tracer.enter("server", PARENT)
    server.set(pages=7, ratio=0.5, ok=True, name="n")
    child = server.child("child", "client")
    child.end("lost")
    server.end()
    root.end()
    spans = {span.name: span for span in collector.wait(lambda spans: len(spans) == 3)}
    tracer.close()
    assert (spans["server"].trace_id, spans["server"].parent_id) == (PARENT[3:35], PARENT[36:52])
    assert spans["child"].parent_id == spans["server"].span_id == server.traceparent[36:52]
    assert spans["root"].parent_id == ""
    assert spans["root"].trace_id == root.traceparent[3:35] != PARENT[3:35]
    assert [spans[name].kind for name in ("server", "child")] == [2, 3]
    assert spans["server"].attributes == {
        "tandem.pages": 7,
        "tandem.ratio": 0.5,
        "tandem.ok": True,
        "tandem.name": "n",
    }
    assert (spans["child"].error, spans["server"].error) == ("lost", "")
    resource = spans["server"].resource
    names = ("service.name", "service.instance.id", "service.version")
    assert [resource[name] for name in names] == ["tandem-test", "i-1", "1.2"]


def test_closing_sends_the_rest(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.telemetry.otlp.CLOSE_SECONDS", 60.0)
    tracer = started(collector.endpoint)
    tracer.enter("x", PARENT).end()
    tracer.close()
    assert [span.name for span in collector.spans] == ["x"]


def test_a_dead_collector_costs_spans_one_line_and_no_time(
    quick: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.telemetry.otlp.EXPORT_SECONDS", 2.0)

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "tandem.telemetry.otlp"]

    away = socket.socket()
    away.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    away.bind(("127.0.0.1", 0))  # nobody listens, and nobody else gets the port
    port = away.getsockname()[1]
    tracer = started(f"http://127.0.0.1:{port}")
    began = time.monotonic()
    for _ in range(10_000):  # more than the queue holds
        tracer.enter("x", PARENT).end()
    assert time.monotonic() - began < 20.0, "two seconds for each of twenty batches, if they were waited for"
    deadline = time.monotonic() + 30
    while not told():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3.0)  # time for another batch
    assert len(told()) == 1, told()
    assert "takes no spans" in caplog.text
    away.close()
    collector = Collector(port)  # it comes back
    try:
        with caplog.at_level(logging.INFO):
            deadline = time.monotonic() + 60
            while "takes spans again" not in caplog.text:
                assert time.monotonic() < deadline
                tracer.enter("y", PARENT).end()
                time.sleep(0.1)
        assert collector.spans
    finally:
        collector.close()
        began = time.monotonic()
        tracer.close()
        assert time.monotonic() - began < 15.0, "half of what the library gives itself"


def test_a_span_nobody_began() -> None:
    span = Span(None)
    assert span.traceparent == ""
    assert not span.is_recording

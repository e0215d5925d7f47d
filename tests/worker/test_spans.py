"""A worker's spans where no hand-off goes as planned: computed here, failed, taken over, never ended."""

from __future__ import annotations

import time

import pytest

from tandem.core.messages import handoff
from tandem.core.messages.handoff import EndCode, Open, OpenStream, ReleaseReason, SendComplete, Sharding
from tandem.core.messages.requests import Ended, EndReason, PrefillPeer, Submit, Timing
from tandem.core.messages.sampling import SamplingParams
from tandem.core.token_ids import pack
from tandem.telemetry.tracing import FinishedSpan, Tracer, parse_traceparent
from tandem.worker.spans import WorkerSpans
from tests.telemetry.test_tracing import PARENT, Kept

HANDOFF = b"h" * 16


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def spans(kept: Kept) -> WorkerSpans:
    return WorkerSpans(Tracer(kept))


def submit(request_id: int = 1) -> Submit:
    peer = PrefillPeer(address="p:1", instance_id=b"i" * 16, handoff_id=HANDOFF, attempt=1)
    return Submit(request_id=request_id, prompt_token_ids=pack([1, 2, 3]), sampling=SamplingParams(), peers=(peer,))


def opening(attempt: int = 1 << 32) -> OpenStream:
    opened = Open(
        handoff_id=HANDOFF,
        attempt=attempt,
        importer_instance_id=b"d" * 16,
        prompt_token_ids=pack([1, 2, 3]),
        output_tokens=0,
        sampling=SamplingParams(),
        tokens_held=0,
        fingerprint="f",
        numerics="",
        sharding=Sharding(),
        transports=("tcp",),
        checksums=("xxh3",),
    )
    return OpenStream(1, "p:1", b"i" * 16, opened)


def ended(reason: EndReason = EndReason.LENGTH, **timing: float) -> Ended:
    return Ended(request_id=1, reason=reason, timing=Timing(**timing), completion_tokens=5)  # type: ignore[arg-type]


def by_name(kept: Kept) -> dict[str, FinishedSpan]:
    assert len({span.name for span in kept.spans}) == len(kept.spans)
    return {span.name: span for span in kept.spans}


def test_a_prompt_computed_here(spans: WorkerSpans, kept: Kept) -> None:
    spans.submitted(submit(), PARENT)
    time.sleep(0.01)
    spans.ended(ended(queue_seconds=0.002, prefill_seconds=0.003, decode_seconds=0.004))
    found = by_name(kept)
    assert found.keys() == {"queue", "prefill", "decode", "request"}
    seconds = {name: (span.end_ns - span.begin_ns) / 1e9 for name, span in found.items()}
    assert [seconds[name] for name in ("queue", "prefill", "decode")] == pytest.approx([0.002, 0.003, 0.004])
    assert found["queue"].end_ns == found["prefill"].begin_ns
    # The phases end where the request does, not nine milliseconds after its beginning.
    assert found["decode"].end_ns - found["request"].begin_ns > 9.9e6
    assert found["request"].parent == parse_traceparent(PARENT)


def test_a_failed_handoff_and_then_computed_here(spans: WorkerSpans, kept: Kept) -> None:
    spans.submitted(submit(), PARENT)
    time.sleep(0.002)
    stream = spans.importing(opening())
    assert parse_traceparent(stream.traceparent) is not None
    stream.ended("lost")
    stream.ended("again")
    stream.released(ReleaseReason.LOCAL)
    time.sleep(0.002)
    spans.ended(ended(queue_seconds=0.001, prefill_seconds=0.001))
    found = by_name(kept)  # the wait is told once
    assert found["handoff"].error == "lost"
    assert found["handoff"].attributes["tandem.attempt"] == "1.0"
    assert found["handoff"].parent == found["request"].context
    assert found["request"].error == ""


@pytest.mark.parametrize("reason", [EndReason.CANCELLED, EndReason.DEADLINE, EndReason.FAILED, EndReason.DRAINED])
def test_an_end_that_is_none_is_marked(spans: WorkerSpans, kept: Kept, reason: EndReason) -> None:
    spans.submitted(submit(), PARENT)
    spans.ended(ended(reason))
    spans.ended(ended(reason))
    assert by_name(kept)["request"].error == reason.value


def test_an_export_that_is_taken_over_or_lost(spans: WorkerSpans, kept: Kept) -> None:
    for code, expected in ((EndCode.SUPERSEDED, "superseded"), (None, "lost")):
        span = spans.exporting(opening().open, PARENT)
        span.ended(code)
        span.ended(EndCode.OK)
        assert kept.spans[-1].error == expected


def test_an_export_ends_when_everything_is_announced(spans: WorkerSpans, kept: Kept) -> None:
    span = spans.exporting(opening().open, PARENT)
    time.sleep(0.005)  # more than the phases take
    span.sent(handoff.SendFirstToken(1, handoff.FirstToken(token_id=4, cached_tokens=2)))
    span.sent(SendComplete(1, handoff.Complete(queue_seconds=0.001, prefill_seconds=0.002)))
    announced = time.time_ns()
    time.sleep(0.05)
    span.ended(EndCode.OK)  # released
    found = by_name(kept)
    assert found.keys() == {"queue", "prefill", "handoff"}
    assert found["handoff"].attributes["tandem.cached_tokens"] == 2
    assert found["handoff"].end_ns < announced + 40e6


def test_what_is_left_when_the_worker_stops(spans: WorkerSpans, kept: Kept) -> None:
    spans.submitted(submit(), PARENT)
    spans.close()
    assert by_name(kept)["request"].error == "worker_stopped"


def test_nothing_is_kept_without_a_trace(kept: Kept) -> None:
    off = WorkerSpans(Tracer.off())
    off.submitted(submit(1), "")
    assert off.importing(opening()).traceparent == ""
    off.submitted(submit(2), PARENT)
    assert off.importing(opening()).traceparent == PARENT  # passed on
    off.ended(Ended(request_id=2, reason=EndReason.STOP))
    assert off.importing(opening()).traceparent == ""
    assert not off._requests and not off._of_handoff and not off._queued

"""A worker's spans: of the requests that gateways submit, of the hand-offs it opens, of those that it computes.

All of it happens in the frontend's process: when a request ends, its timing is there. A hand-off is found by its id,
which the gateway chose, so the scheduler knows nothing of traces. Without a tracer nothing is kept but traceparents
that are to be passed on.
"""

from __future__ import annotations

from tandem.core.messages.handoff import (
    Announce,
    EndCode,
    Open,
    OpenStream,
    ReleaseReason,
    SendAccepted,
    SendAnnounce,
    SendComplete,
    SendFirstToken,
)
from tandem.core.messages.requests import Ended, EndReason, Submit
from tandem.core.token_ids import BYTES_PER_TOKEN
from tandem.rpc.handoff_wire import Response
from tandem.telemetry.tracing import Span, Tracer

_CHECKSUM_BYTES = 8
_NO_ERROR = (EndReason.STOP, EndReason.LENGTH, EndReason.HANDED_OFF)


class WorkerSpans:
    """Every live span of the worker: as many as there are live requests and streams. Use it in one event loop."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._requests: dict[int, tuple[Span, Submit]] = {}
        self._queued: set[Span] = set()  # requests whose wait for their first hand-off is told
        self._of_handoff: dict[bytes, Span] = {}

    def submitted(self, submit: Submit, traceparent: str) -> None:
        """A gateway's request has been passed on to the rank, which will say how it ended."""
        span = self._tracer.enter("request", traceparent)
        if not span.traceparent:
            return
        span.set(
            prompt_tokens=len(submit.prompt_token_ids) // BYTES_PER_TOKEN,
            resumed_tokens=len(submit.output_token_ids) // BYTES_PER_TOKEN,
        )
        self._requests[submit.request_id] = (span, submit)
        for peer in submit.peers:
            self._of_handoff[peer.handoff_id] = span

    def ended(self, ended: Ended) -> None:
        """The rank's last word about a request."""
        span, submit = self._requests.pop(ended.request_id, (None, None))
        if span is None or submit is None:
            return
        for peer in submit.peers:
            if self._of_handoff.get(peer.handoff_id) is span:
                del self._of_handoff[peer.handoff_id]
        timing, begin, end = ended.timing, span.begin_ns, span.now_ns()
        if not timing.transport:  # computed here
            started = begin + _ns(timing.queue_seconds)
            if span not in self._queued:
                span.phase("queue", begin, started)
            span.phase("prefill", started, started + _ns(timing.prefill_seconds))
        self._queued.discard(span)
        span.phase("decode", end - _ns(timing.decode_seconds), end)
        span.set(
            completion_tokens=ended.completion_tokens,
            cached_tokens=ended.cached_tokens,
            kv_bytes=timing.transfer_bytes,
            kv_transport=timing.transport,
            prefill_worker=timing.prefill_worker,
            end_reason=ended.reason.value,
        )
        span.end("" if ended.reason in _NO_ERROR else ended.reason.value)

    def importing(self, effect: OpenStream) -> ImportSpan:
        """A hand-off stream is about to be opened."""
        parent = self._of_handoff.get(effect.open.handoff_id)
        if parent is None:
            return ImportSpan(Span(None), effect)
        if parent not in self._queued and parent.is_recording:
            self._queued.add(parent)
            parent.phase("queue", parent.begin_ns, parent.now_ns())
        return ImportSpan(parent.child("handoff", "client"), effect)

    def exporting(self, opened: Open, traceparent: str) -> ExportSpan:
        """A hand-off stream has been opened here."""
        return ExportSpan(self._tracer.enter("handoff", traceparent), opened)

    def close(self) -> None:
        """End what is still there: the worker goes."""
        for span, _ in self._requests.values():
            span.end("worker_stopped")
        self._requests.clear()
        self._queued.clear()
        self._of_handoff.clear()


class ImportSpan:
    """One attempt of decode to have a prompt computed elsewhere, from Open to Release."""

    def __init__(self, span: Span, effect: OpenStream) -> None:
        self._span = span
        self._announced_ns = 0
        self._num_pages = 0
        if span.is_recording:
            span.set(
                peer=effect.address, handoff_id=effect.open.handoff_id.hex(), attempt=_attempt(effect.open.attempt)
            )

    @property
    def traceparent(self) -> str:
        """What Open carries."""
        return self._span.traceparent

    def heard(self, response: Response) -> None:
        """The peer said something."""
        if isinstance(response, Announce) and self._span.is_recording:
            self._announced_ns = self._announced_ns or self._span.now_ns()
            self._num_pages += sum(len(rank.checksums) // _CHECKSUM_BYTES for rank in response.ranks)

    def released(self, reason: ReleaseReason) -> None:
        """Decode needs it no more: with DONE, every page is here."""
        self._span.set(pages=self._num_pages)
        if self._announced_ns:
            self._span.phase("pull", self._announced_ns, self._span.now_ns())
        self._span.end("" if reason is ReleaseReason.DONE else reason.value)

    def ended(self, code: str) -> None:
        """The stream is over, however; after a release that is no news."""
        self._span.end(code)


class ExportSpan:
    """One hand-off on prefill, until everything is computed and announced."""

    def __init__(self, span: Span, opened: Open) -> None:
        self._span = span
        if span.is_recording:
            span.set(
                handoff_id=opened.handoff_id.hex(),
                attempt=_attempt(opened.attempt),
                prompt_tokens=len(opened.prompt_token_ids) // BYTES_PER_TOKEN,
                tokens_held=opened.tokens_held,
            )

    def sent(self, effect: SendAccepted | SendAnnounce | SendFirstToken | SendComplete) -> None:
        """The rank said something."""
        if isinstance(effect, SendFirstToken):
            self._span.set(cached_tokens=effect.first_token.cached_tokens)
        elif isinstance(effect, SendComplete) and self._span.is_recording:
            begin, complete = self._span.begin_ns, effect.complete
            started = begin + _ns(complete.queue_seconds)
            self._span.phase("queue", begin, started)
            self._span.phase("prefill", started, started + _ns(complete.prefill_seconds))
            self._span.end()

    def ended(self, code: EndCode | None) -> None:
        """The stream is over; after the last announcement that is no news. None: lost."""
        self._span.end(code.value if code is not None else EndCode.LOST.value)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _attempt(attempt: int) -> str:
    return f"{attempt >> 32}.{attempt & 0xFFFFFFFF}"

"""What is remembered of one request for metrics and its log line: times and counts, never content."""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import Any, Self

from tandem.errors import TandemError
from tandem.gateway.prepared import Delta, Finish, Prepared
from tandem.rpc.status import code_of
from tandem.telemetry.gateway import GatewayMetrics
from tandem.telemetry.tracing import Span

_logger = logging.getLogger(__name__)


class RequestRecord:
    """Use it as a context around a request; leaving it writes the log line and the metrics."""

    def __init__(self, api: str, request_id: str, metrics: GatewayMetrics, span: Span, *, deadline: float) -> None:
        """`deadline` is a time of the running loop's clock: what is cancelled after it has met it."""
        self._api = api
        self._span = span
        self._request_id = request_id
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline
        self._started = time.perf_counter()
        self._first_output: float | None = None
        self._last_output = 0.0
        self._num_tokens = 0
        self._num_resumptions = 0
        self._prepared: Prepared | None = None
        self._finish: Finish | None = None

    @property
    def traceparent(self) -> str:
        """What the workers are given."""
        return self._span.traceparent

    def prepared(self, prepared: Prepared) -> None:
        """The request was understood."""
        self._prepared = prepared

    def on_tokens(self, count: int) -> None:
        """Output has arrived from a worker."""
        now = time.perf_counter()
        if self._first_output is None:
            self._first_output = now
            self._metrics.first_output(self._api, now - self._started)
        else:
            self._metrics.next_output(self._api, now - self._last_output)
        self._last_output = now
        self._num_tokens += count
        self._metrics.output_tokens(count)

    def on_resumed(self) -> None:
        """An answer goes on at another worker."""
        self._num_resumptions += 1

    def on_delta(self, delta: Delta) -> None:
        """Output goes to the client."""
        if delta.finish is not None:
            self._finish = delta.finish

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        code = self._code(error)
        tpot: float | None = None
        if self._first_output is not None and self._num_tokens > 1:
            tpot = (self._last_output - self._first_output) / (self._num_tokens - 1)
        self._metrics.ended(
            self._api,
            code,
            seconds,
            ttft_seconds=None if self._first_output is None else self._first_output - self._started,
            tpot_seconds=tpot,
            finish=self._finish.reason.value if error is None and self._finish is not None else "none",
        )
        if self._prepared is not None:
            cached = self._finish.cached_tokens if self._finish is not None else 0
            self._metrics.prompt(len(self._prepared.prompt_token_ids), cached)
        fields = self._fields(code, seconds, tpot, error)
        _logger.info("request ended", extra={"fields": fields})
        self._span.set(**fields)
        self._span.end("" if code == "OK" else code)

    def _code(self, error: BaseException | None) -> str:
        if error is None:
            return "OK"
        if isinstance(error, TandemError):
            return code_of(error).name
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            return "DEADLINE_EXCEEDED" if self._loop.time() >= self._deadline else "CANCELLED"
        return "INTERNAL"

    def _fields(self, code: str, seconds: float, tpot: float | None, error: BaseException | None) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "request_id": self._request_id,
            "api": self._api,
            "code": code,
            "seconds": round(seconds, 4),
            "completion_tokens": self._num_tokens,
            "resumptions": self._num_resumptions,
        }
        if isinstance(error, TandemError):
            fields["reason"] = error.reason
        if self._prepared is not None:
            fields["prompt_tokens"] = len(self._prepared.prompt_token_ids)
        if self._first_output is not None:
            fields["ttft"] = round(self._first_output - self._started, 4)
        if tpot is not None:
            fields["tpot"] = round(tpot, 5)
        if self._finish is not None:
            finish = self._finish
            fields |= {
                "finish": finish.reason.value,
                "cached_tokens": finish.cached_tokens,
                "decode_worker": finish.decode_worker,
                "prefill_worker": finish.timing.prefill_worker,
                "queue": round(finish.timing.queue_seconds, 4),
                "prefill": round(finish.timing.prefill_seconds, 4),
                "transfer": round(finish.timing.transfer_seconds, 4),
                "first_decode": round(finish.timing.first_decode_seconds, 4),
                "transfer_bytes": finish.timing.transfer_bytes,
                "transport": finish.timing.transport,
            }
        return fields

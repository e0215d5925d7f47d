"""Rates for gateways out of a worker's running totals."""

from __future__ import annotations

from tandem.core.stats import LoadSnapshot
from tandem.rpc.convert_worker import load_to_proto
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2

WINDOW_SECONDS = 1.0


class LoadRates:
    """Turns snapshots into wire loads; rates are those of the last whole window of about a second."""

    def __init__(self) -> None:
        self._sequence = 0
        self._since: float | None = None
        self._before = LoadSnapshot()
        self._rates: dict[str, float] = {}

    def to_proto(self, load: LoadSnapshot, now: float) -> worker_pb2.LoadSnapshot:
        """Return `load` with a new sequence number; `now` is monotonic seconds."""
        if self._since is None:
            self._since, self._before = now, load
        elif now - self._since >= WINDOW_SECONDS:
            self._rates = _rates(self._before, load, now - self._since)
            self._since, self._before = now, load
        self._sequence += 1
        message = load_to_proto(load, sequence=self._sequence, mono_ns=round(now * 1e9))
        for name, value in self._rates.items():
            setattr(message, name, value)
        return message


def _rates(before: LoadSnapshot, after: LoadSnapshot, seconds: float) -> dict[str, float]:
    generated = after.generated_tokens - before.generated_tokens
    computed = after.computed_tokens - before.computed_tokens
    steps = after.steps - before.steps
    transfer_seconds = after.transfer_seconds - before.transfer_seconds
    transferred = after.transferred_bytes - before.transferred_bytes
    return {
        "gen_tokens_per_s": generated / seconds,
        "prefill_tokens_per_s": max(0, computed - generated) / seconds,
        "step_ms_ewma": 1000 * (after.device_seconds - before.device_seconds) / steps if steps else 0.0,
        "kv_transfer_gbytes_per_s": transferred / transfer_seconds / 1e9 if transfer_seconds > 0 else 0.0,
    }

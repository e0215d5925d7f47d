"""Counting for people: histograms, ends by reason, hand-offs by transport and peer. Decides nothing.

Observed once a plan, a request or a pull, never once a token; `Tallies.figures` copies it into a snapshot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from tandem.core.messages.requests import EndReason
from tandem.core.stats import (
    BATCH_ROWS,
    BATCH_TOKENS,
    HANDOFF_FAILURES,
    PULL_RESULTS,
    STEP_SECONDS,
    WAIT_SECONDS,
    HistogramCounts,
    PeerFigures,
    TransportFigures,
)

MAX_PEERS = 32
OTHER_PEERS = "other"


class Histogram:
    """Observations by bucket; `bounds` are inclusive and ascending."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def figures(self) -> HistogramCounts:
        return HistogramCounts(tuple(self._counts), self._total)


class DeviceTime:
    """When the device had plans and when none, as the loop sees it: monotonic seconds of launches and results."""

    def __init__(self, steps: Histogram) -> None:
        self._steps = steps
        self._launched: deque[float] = deque()
        self._resolved = 0.0
        self._free_since: float | None = None
        self._idle_seconds = 0.0

    def launched(self, now: float) -> None:
        if not self._launched:
            self._idle_seconds = self.idle_seconds(now)
        self._launched.append(now)

    def resolved(self, now: float) -> None:
        """The oldest plan is done. Its step began when it was launched, or when the plan before it was done."""
        self._steps.observe(max(0.0, now - max(self._launched.popleft(), self._resolved)))
        self._resolved = now
        if not self._launched:
            self._free_since = now

    def idle_seconds(self, now: float) -> float:
        """Return the seconds without a plan since the first call of this object."""
        if self._launched:
            return self._idle_seconds
        if self._free_since is None:
            self._free_since = now
        return self._idle_seconds + max(0.0, now - self._free_since)


@dataclass(slots=True)
class _Transport:
    pulls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PULL_RESULTS, 0))
    num_bytes: int = 0
    seconds: float = 0.0
    mismatched_pages: int = 0
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HANDOFF_FAILURES, 0))


@dataclass(slots=True)
class _Peer:
    landed: int = 0
    failed: int = 0
    num_bytes: int = 0
    numerics: str = ""
    differing: int = 0

    def add(self, other: _Peer) -> None:
        self.landed += other.landed
        self.failed += other.failed
        self.num_bytes += other.num_bytes
        self.differing += other.differing


class HandoffTallies:
    """Hand-offs as decode receives them. Names a bounded number of peers; those not seen for longest are summed up."""

    def __init__(self) -> None:
        self._transports: dict[str, _Transport] = {}
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._others = _Peer()

    def pulled(
        self, peer: str, transport: str, result: str, *, num_bytes: int, seconds: float, num_bad_pages: int
    ) -> None:
        """A pull is over; `result` is one of PULL_RESULTS."""
        figures = self._transport(transport)
        figures.pulls[result] += 1
        figures.num_bytes += num_bytes
        figures.seconds += seconds
        figures.mismatched_pages += num_bad_pages
        self._peer(peer).num_bytes += num_bytes

    def accepted(self, peer: str, numerics: str, *, differs: bool) -> None:
        """A peer has accepted an attempt and said which `numerics` it computes with."""
        figures = self._peer(peer)
        figures.numerics, figures.differing = numerics, int(differs)

    def failed(self, peer: str, transport: str, reason: str) -> None:
        """An attempt failed; `reason` is one of HANDOFF_FAILURES."""
        self._transport(transport).failures[reason] += 1
        self._peer(peer).failed += 1

    def landed(self, peer: str) -> None:
        """A request has all of its pages from `peer`."""
        self._peer(peer).landed += 1

    def transports(self) -> tuple[TransportFigures, ...]:
        return tuple(
            TransportFigures(
                transport=name,
                pulls=dict(each.pulls),
                num_bytes=each.num_bytes,
                seconds=each.seconds,
                mismatched_pages=each.mismatched_pages,
                failures=dict(each.failures),
            )
            for name, each in self._transports.items()
        )

    def peers(self) -> tuple[PeerFigures, ...]:
        others = [(OTHER_PEERS, self._others)] if self._others != _Peer() else []
        return tuple(
            PeerFigures(
                address=address,
                landed=each.landed,
                failed=each.failed,
                num_bytes=each.num_bytes,
                numerics=each.numerics,
                differing=each.differing,
            )
            for address, each in [*self._peers.items(), *others]
        )

    def _transport(self, name: str) -> _Transport:
        figures = self._transports.get(name)
        if figures is None:
            figures = self._transports[name] = _Transport()
        return figures

    def _peer(self, address: str) -> _Peer:
        figures = self._peers.pop(address, None) or _Peer()
        self._peers[address] = figures
        if len(self._peers) > MAX_PEERS:
            self._others.add(self._peers.popitem(last=False)[1])
        return figures


class Tallies:
    """Everything that one worker counts beside its running totals."""

    def __init__(self) -> None:
        self.ended: dict[str, int] = dict.fromkeys((reason.value for reason in EndReason), 0)
        self.handoffs = HandoffTallies()
        self.queue = Histogram(WAIT_SECONDS)
        self.prefill = Histogram(WAIT_SECONDS)
        self.handoff = Histogram(WAIT_SECONDS)
        self.handoff_stall = Histogram(WAIT_SECONDS)
        self.first_decode = Histogram(WAIT_SECONDS)
        self._steps = Histogram(STEP_SECONDS)
        self.batch_requests = Histogram(BATCH_ROWS)
        self.batch_tokens = Histogram(BATCH_TOKENS)
        self.device = DeviceTime(self._steps)

    def figures(self, now: float) -> dict[str, Any]:
        """Return the fields of LoadSnapshot that come from here."""
        return {
            "device_idle_seconds": self.device.idle_seconds(now),
            "ended_requests": dict(self.ended),
            "transports": self.handoffs.transports(),
            "peers": self.handoffs.peers(),
            "queue_seconds": self.queue.figures(),
            "prefill_seconds": self.prefill.figures(),
            "handoff_seconds": self.handoff.figures(),
            "handoff_stall_seconds": self.handoff_stall.figures(),
            "first_decode_seconds": self.first_decode.figures(),
            "step_seconds": self._steps.figures(),
            "batch_requests": self.batch_requests.figures(),
            "batch_tokens": self.batch_tokens.figures(),
        }

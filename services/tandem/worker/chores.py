"""What the event loop does beside its work: figures for the frontend, and the self-check of an idle worker."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from tandem.core.messages.worker import Stats
from tandem.core.scheduler import Scheduler
from tandem.core.stats import LoadSnapshot
from tandem.core.tallies import OTHER_PEERS

STATS_SECONDS = 0.1  # at most so often, when something has changed,
BEAT_SECONDS = 5.0  # and so often when nothing has: the frontend hears that the loop still turns
IDLE_SECONDS = 0.2  # how long nothing has happened when the self-check runs
CHECK_SECONDS = 1.0  # at least so long between two self-checks,
WARNED_MAX = 1024  # peers that are remembered as warned of
CHECK_SHARE = 0.01  # and so that they take no more than this share of the time: a large pool takes a while
_logger = logging.getLogger(__name__)


class Chores:
    """Timers of the loop that are not the scheduler's. The check is off while nothing happens after it."""

    def __init__(self, send: Callable[[object], None], clock: Callable[[], float]) -> None:
        self._send = send
        self._clock = clock
        self._stats_due = clock() + BEAT_SECONDS
        self._check_due: float | None = None
        self._last_stats = self._last_sent = float("-inf")
        self._next_check = float("-inf")
        self._sent: LoadSnapshot | None = None
        self._warned: OrderedDict[str, str] = OrderedDict()  # peers by address, and the numerics that they had

    def next_due(self) -> float:
        """When `run` wants to be called again."""
        return self._stats_due if self._check_due is None else min(self._stats_due, self._check_due)

    def run(self, scheduler: Scheduler, *, happened: bool, idle: bool, now: float) -> None:
        """Do what is due. Call after every turn of the loop.

        `happened`: the turn was not one of ours only; `idle`: the device has nothing to do.
        """
        if happened:
            self._check_due = max(now + IDLE_SECONDS, self._next_check)
            self._stats_due = min(self._stats_due, max(now, self._last_stats + STATS_SECONDS))
        if now >= self._stats_due:
            self._report(scheduler, now)
        if self._check_due is not None and now >= self._check_due:
            if idle:
                self._check(scheduler)
            else:
                self._check_due = now + IDLE_SECONDS

    def _check(self, scheduler: Scheduler) -> None:
        self._check_due = None
        began = self._clock()
        for fault in scheduler.self_check():
            _logger.error("self-check: %s", fault)
        ended = self._clock()
        self._next_check = ended + max(CHECK_SECONDS, (ended - began) / CHECK_SHARE)

    def _report(self, scheduler: Scheduler, now: float) -> None:
        load = scheduler.load(now)
        if load != self._sent or now - self._last_sent >= BEAT_SECONDS:
            self._sent, self._last_sent = load, now
            self._send(Stats(load))
            self._warn_of_numerics(load, scheduler)
        self._last_stats, self._stats_due = now, now + BEAT_SECONDS

    def _warn_of_numerics(self, load: LoadSnapshot, scheduler: Scheduler) -> None:
        """Say once for each pair that it loses bit-exactness, and nothing else."""
        for peer in load.peers:
            if not peer.differing or self._warned.get(peer.address) == peer.numerics or peer.address == OTHER_PEERS:
                continue
            self._warned[peer.address] = peer.numerics
            if len(self._warned) > WARNED_MAX:
                self._warned.popitem(last=False)
            _logger.warning(
                "prefill worker %s computes with numerics %s, this one with %s: its pages serve their own request "
                "and are not cached; answers may differ in the last bits (docs/numerics.md)",
                peer.address,
                peer.numerics or "not claimed",
                scheduler.settings.numerics or "not claimed",
            )

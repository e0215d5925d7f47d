"""Small decisions that people may want to tune: how long a plan may be, and which pairs are fenced."""

from __future__ import annotations

from collections import OrderedDict

_SMOOTHING = 0.3
_MAX_PEERS = 1024


class PlanBudget:
    """Tokens of the next plan: a count bound, and a time bound by the measured rate."""

    def __init__(self, max_tokens: int, max_seconds: float) -> None:
        self._max_tokens = max_tokens
        self._max_seconds = max_seconds
        self._tokens_per_second = 0.0

    def measured(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """Learn from a resolved plan.

        Rows of one token each are slower than a prompt of as many: they say nothing about its rate, unless they are
        faster than what is known. So one slow plan cannot shrink the next ones until nothing is ever learned again.
        """
        if seconds <= 0.0:
            return
        rate = num_tokens / seconds
        known = self._tokens_per_second
        if num_tokens < 2 * num_rows and not 0.0 < known < rate:
            return
        self._tokens_per_second = rate if known == 0.0 else known + _SMOOTHING * (rate - known)

    def tokens(self) -> int:
        """Return the budget, at least 1."""
        if self._tokens_per_second == 0.0 or self._max_seconds == 0.0:
            return self._max_tokens
        return max(1, int(min(self._max_tokens, self._tokens_per_second * self._max_seconds)))


class Fences:
    """Peers with too many faults in a row are not paired with for a while. Remembers a bounded number of peers."""

    def __init__(self, faults: int, seconds: float) -> None:
        self._limit = faults
        self._seconds = seconds
        self._faults: OrderedDict[bytes, int] = OrderedDict()
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def fault(self, instance_id: bytes, now: float) -> None:
        count = self._faults.pop(instance_id, 0) + 1
        if count >= self._limit:
            self._until[instance_id] = now + self._seconds
            self._until.move_to_end(instance_id)
        else:
            self._faults[instance_id] = count
        for table in (self._faults, self._until):
            while len(table) > _MAX_PEERS:
                table.popitem(last=False)

    def success(self, instance_id: bytes) -> None:
        self._faults.pop(instance_id, None)

    def is_fenced(self, instance_id: bytes, now: float) -> bool:
        until = self._until.get(instance_id)
        if until is None:
            return False
        if now >= until:
            del self._until[instance_id]
            return False
        return True

    def fenced(self, now: float) -> tuple[bytes, ...]:
        return tuple(peer for peer in list(self._until) if self.is_fenced(peer, now))

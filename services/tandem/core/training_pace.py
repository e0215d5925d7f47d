"""How much of the device's time a training may take: a pure decision over what its launches took."""

from __future__ import annotations


class TrainingPace:
    """After a launch of s seconds the next one waits s * (1 / share - 1): never more than `share` of any long while."""

    def __init__(self, share: float) -> None:
        assert 0.0 < share <= 1.0
        self._rest = 1.0 / share - 1.0
        self._due = 0.0
        self._began = 0.0
        self._taken = 0.0

    def begin(self, now: float) -> None:
        """Start to count."""
        self._due = self._began = now
        self._taken = 0.0

    def due(self) -> float:
        """When the next launch may be, if the device has nothing else to do then."""
        return self._due

    def resolved(self, device_seconds: float, now: float) -> None:
        """A launch has ended."""
        self._taken += device_seconds
        self._due = now + device_seconds * self._rest

    def share(self, now: float) -> float:
        """What was taken so far, of the time since `begin`."""
        return self._taken / (now - self._began) if now > self._began else 0.0

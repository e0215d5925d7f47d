"""A rank's tie to its transfer process: starts it, starts it again when it dies, and never makes the loop wait.

A transfer process that is gone takes all of its reads with it; that is what TransferLost says, once for each life that
had been ready. Commands for a process that is not there are dropped: after TransferLost nobody awaits their answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

from tandem.core.messages.transfer import (
    Adopt,
    RankCommand,
    Restart,
    TransferLost,
    TransferOutcome,
    TransferReady,
    TransportFallback,
)
from tandem.ipc import Channel, ChannelClosed

BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 10.0
STABLE_SECONDS = 30.0  # a life of this length makes the next backoff short again
READY_SECONDS = 30.0  # a process that is not ready by then is ended and started again
_logger = logging.getLogger(__name__)


class Process(Protocol):
    """A running transfer process; `stop` ends it, at once if need be, and reaps it."""

    @property
    def channel(self) -> Channel: ...

    @property
    def pid(self) -> int: ...

    def stop(self) -> None: ...


class TransferLink:
    """A RankLink with at most one life of the process at a time. `adopt` is told of pages that are here as a whole."""

    def __init__(
        self, spawn: Callable[[], Process], clock: Callable[[], float], adopt: Callable[[Sequence[int]], None]
    ) -> None:
        self._spawn = spawn
        self._clock = clock
        self._adopt = adopt
        self._process: Process | None = None
        self._ready = False
        self._started = 0.0
        self._restart_due: float | None = clock()
        self._backoff = BACKOFF_SECONDS_MIN

    @property
    def channel(self) -> Channel | None:
        """What to watch; None while there is no process."""
        return self._process.channel if self._process is not None else None

    def next_due(self) -> float | None:
        """When `advance` wants to be called: to start the process, or to give up waiting for it."""
        if self._process is None:
            return self._restart_due
        return None if self._ready else self._started + READY_SECONDS

    def advance(self) -> list[TransferOutcome]:
        """Start the process if that is due; end one that does not become ready."""
        now = self._clock()
        if self._process is None and self._restart_due is not None and now >= self._restart_due:
            self._start(now)
        elif self._process is not None and not self._ready and now >= self._started + READY_SECONDS:
            return self._lost(f"not ready within {READY_SECONDS:g} s")
        return []

    def send(self, command: RankCommand) -> None:
        """Queue a command; `flush` after a batch."""
        if isinstance(command, Adopt):
            self._adopt(command.pages)
            return
        if self._process is None:
            return
        if isinstance(command, Restart):
            self._break("it is to be restarted")
            return
        try:
            self._process.channel.send(command)
        except ChannelClosed as error:
            self._break(str(error))

    def flush(self) -> None:
        """Write what the pipe takes. A broken pipe is noticed by `receive`."""
        if self._process is None:
            return
        try:
            self._process.channel.flush()
        except ChannelClosed as error:
            self._break(str(error))

    def receive(self) -> list[TransferOutcome]:
        """Take what the process says; TransferLost is the last word of a life."""
        if self._process is None:
            return []
        try:
            outcomes: list[TransferOutcome] = self._process.channel.receive()
        except (ChannelClosed, ValueError) as error:
            return self._lost(str(error))
        for outcome in outcomes:
            self._note(outcome)
        return outcomes

    def stop(self) -> None:
        """End the process for good."""
        process, self._process, self._restart_due = self._process, None, None
        if process is not None:
            process.stop()

    def _start(self, now: float) -> None:
        self._restart_due, self._started, self._ready = None, now, False
        try:
            self._process = self._spawn()
        except OSError as error:
            _logger.error("the transfer process cannot be started: %s", error)
            self._schedule(now)

    def _note(self, outcome: TransferOutcome) -> None:
        match outcome:
            case TransferReady():
                self._ready = True
            case TransportFallback():
                _logger.warning(
                    "transport of peer %s: %s instead of %s: %s",
                    outcome.peer_instance_id.hex(),
                    outcome.to_transport,
                    outcome.from_transport,
                    outcome.message,
                )

    def _break(self, message: str) -> None:
        """Kill the process. What it has said is still to be read; `receive` tells of the loss when the pipe ends."""
        assert self._process is not None
        _logger.error("transfer process %d takes no commands: %s", self._process.pid, message)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)

    def _lost(self, message: str) -> list[TransferOutcome]:
        process, self._process = self._process, None
        assert process is not None
        process.stop()
        now = self._clock()
        was_ready, self._ready = self._ready, False
        if now - self._started >= STABLE_SECONDS:
            self._backoff = BACKOFF_SECONDS_MIN
        _logger.error("transfer process %d is gone (%s), next start in %g s", process.pid, message, self._backoff)
        self._schedule(now)
        return [TransferLost(message)] if was_ready else []

    def _schedule(self, now: float) -> None:
        self._restart_due = now + self._backoff
        self._backoff = min(self._backoff * 2, BACKOFF_SECONDS_MAX)

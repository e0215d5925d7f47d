"""Where the event loop's events come from and its effects go to: frontend pipe, device, transfer processes, clock.

One selector; nothing here blocks but `wait`. Events of one source keep their order, and so do effects to one
destination. What does not fit into a pipe is written when the pipe takes it, which `wait` sees to.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Mapping
from typing import Any

from tandem.core.messages.requests import Ended, Tokens
from tandem.core.messages.transfer import CancelPull, Export, Pull, Revoke
from tandem.engine.device import Device
from tandem.ipc import Channel
from tandem.worker.messages import StepEnded
from tandem.worker.transfer_group import TransferGroup, Watched

_TO_TRANSFER = (Export, Revoke, Pull, CancelPull)
_TO_CLIENTS = (Tokens, Ended)


class RankPorts:
    """The ports of rank 0. Raises ChannelClosed from every call once the frontend is gone: then so is this rank.

    `transfer` is None for a worker that hands nothing over.
    """

    def __init__(
        self, frontend: Channel, device: Device, transfer: TransferGroup | None, clock: Callable[[], float]
    ) -> None:
        self._frontend = frontend
        self._device = device
        self._transfer = transfer
        self._clock = clock
        self._aside: Mapping[type, Callable[[Any], None]] = {}
        self._step = 0
        self._selector = selectors.DefaultSelector()
        self._watched: dict[int, tuple[object, int]] = {}

    def take_aside(self, handlers: Mapping[type, Callable[[Any], None]]) -> None:
        """Hand these messages of the frontend over as they come: they are no events of the scheduler."""
        self._aside = handlers

    def send(self, message: object) -> None:
        """Say something to the frontend beside the scheduler's effects."""
        self._frontend.send(message)
        self._frontend.flush()

    def wait(self, until: float | None) -> list[object]:
        """Block until something happens, or the clock is at `until`; return the events, maybe none."""
        events: list[object] = []
        if self._transfer is not None:
            events += self._transfer.advance()
        self._watch_all()
        due = self._transfer.next_due() if self._transfer is not None else None
        if due is not None:
            until = due if until is None else min(until, due)
        seconds = None if until is None else max(0.0, until - self._clock())
        for key, mask in self._selector.select(0.0 if events else seconds):
            events += self._take(key.data, mask)
        return events

    def flush(self, effects: list[object]) -> None:
        """Send effects on."""
        to_clients = False
        for effect in effects:
            if isinstance(effect, _TO_TRANSFER):
                assert self._transfer is not None, "this role hands nothing over"
                self._transfer.send(effect)
            else:
                self._frontend.send(effect)
                to_clients = to_clients or isinstance(effect, _TO_CLIENTS)
        if to_clients:
            self._step += 1
            self._frontend.send(StepEnded(self._step, time.monotonic_ns()))
        self._frontend.flush()
        if self._transfer is not None:
            self._transfer.flush()

    def finish(self, seconds: float) -> None:
        """Write what the frontend has not taken yet, for at most so long."""
        until = self._clock() + seconds
        while self._frontend.pending_bytes and self._clock() < until:
            self._watch(self._frontend, selectors.EVENT_WRITE)
            self._selector.select(until - self._clock())
            self._frontend.flush()

    def close(self) -> None:
        """Let go of the selector; device and pipes are their owners' to close."""
        self._selector.close()

    def _take(self, source: object, mask: int) -> list[object]:
        if source is self._device:
            return list(self._device.resolved())
        if source is self._frontend:
            if mask & selectors.EVENT_WRITE:
                self._frontend.flush()
            return self._for_scheduler(self._frontend.receive()) if mask & selectors.EVENT_READ else []
        transfer = self._transfer
        assert transfer is not None
        if mask & selectors.EVENT_WRITE:
            transfer.flush()
        return list(transfer.receive()) if mask & selectors.EVENT_READ else []

    def _for_scheduler(self, messages: list[object]) -> list[object]:
        events = []
        for message in messages:
            handler = self._aside.get(type(message))
            if handler is None:
                events.append(message)
            else:
                handler(message)
        return events

    def _watch_all(self) -> None:
        self._watch(self._device, selectors.EVENT_READ)
        self._watch(self._frontend, _interest(self._frontend))
        for channel in self._transfer.channels if self._transfer is not None else ():
            self._watch(channel, _interest(channel))

    def _watch(self, source: Device | Channel | Watched, interest: int) -> None:
        """Register what changed. A descriptor that was closed leaves epoll by itself; its number may come back."""
        fd = source.fileno()
        known = self._watched.get(fd)
        if known == (source, interest):
            return
        if known is not None and known[0] is source:
            self._selector.modify(fd, interest, source)
        else:
            if known is not None:
                self._selector.unregister(fd)
            self._selector.register(fd, interest, source)
        self._watched[fd] = (source, interest)


def _interest(channel: Watched) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.pending_bytes else 0)

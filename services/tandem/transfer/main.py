"""The transfer process: `python -m tandem.transfer.main LAUNCH`, started by TransferProcess.spawn and by nobody else.

It holds no state that matters: it may be killed at any time, and then none of its reads can go on.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import selectors
import signal
import socket
import sys
import threading
from collections import deque

from tandem.core.messages.transfer import TransferOutcome
from tandem.errors import ConfigError
from tandem.ipc import Channel, ChannelClosed
from tandem.transfer.assembly import Assembly
from tandem.transfer.channel import COMMANDS, OUTCOMES, Launch
from tandem.transfer.memory import PoolMemory
from tandem.transfer.pages import PageSpace
from tandem.transfer.service import Service

_PR_SET_PDEATHSIG = 1
_CONFIG_EXIT_CODE = 2
_BUG_EXIT_CODE = 70

_log = logging.getLogger(__name__)


class Outbox:
    """Outcomes from any thread, for the one thread that owns the channel. `fileno` is readable when some are there."""

    def __init__(self) -> None:
        self._outcomes: deque[TransferOutcome] = deque()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._event

    def post(self, outcome: TransferOutcome) -> None:
        self._outcomes.append(outcome)
        os.eventfd_write(self._event, 1)

    def take(self) -> list[TransferOutcome]:
        """Return what is there, oldest first; call it when `fileno` is readable."""
        os.eventfd_read(self._event)
        taken = []
        while self._outcomes:
            taken.append(self._outcomes.popleft())
        return taken


def serve(channel: Channel, service: Service, outbox: Outbox) -> None:
    """Carry commands in and outcomes out until the rank is gone (ChannelClosed)."""
    selector = selectors.DefaultSelector()
    selector.register(outbox, selectors.EVENT_READ)
    selector.register(channel, selectors.EVENT_READ)
    while True:
        channel.flush()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.pending_bytes else 0)
        selector.modify(channel, wanted)
        for key, events in selector.select():
            if key.fileobj is outbox:
                for outcome in outbox.take():
                    channel.send(outcome)
            elif events & selectors.EVENT_READ:
                for command in channel.receive():
                    service.handle(command)


def main() -> None:
    launch = Launch.decode(sys.argv[1])
    _guard()
    channel = Channel(socket.socket(fileno=launch.channel_fd), outgoing=OUTCOMES, incoming=COMMANDS)
    os.set_inheritable(launch.channel_fd, False)
    os.set_inheritable(launch.memory_fd, False)
    memory = PoolMemory.attach(launch.memory_fd, launch.layout.pool_bytes, launch.memory_pages)
    outbox = Outbox()
    try:
        service, first = Assembly(launch, PageSpace(memory.view, launch.layout.page_bytes), outbox.post).build()
    except ConfigError as error:  # a file that was good when the worker began; the rank tries again
        _log.error("%s", error.message)
        os._exit(_CONFIG_EXIT_CODE)
    for outcome in first:
        outbox.post(outcome)
    try:
        serve(channel, service, outbox)
    except ChannelClosed as error:
        _log.info("the transfer process ends: %s", error)
    os._exit(0)  # threads may be blocked in sockets or engines; nothing here needs a tidy end


def _guard() -> None:
    """End with the rank, not with the terminal; let no thread die alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank decides: it still drains
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s transfer %(levelname)s %(message)s")
    threading.excepthook = _die


def _die(args: threading.ExceptHookArgs) -> None:
    """A thread met a bug: its pulls would never end. The rank starts another process and asks again."""
    _log.critical("a thread failed", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))  # type: ignore[arg-type]
    os._exit(_BUG_EXIT_CODE)


if __name__ == "__main__":
    main()

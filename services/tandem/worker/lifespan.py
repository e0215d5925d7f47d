"""How a program is told to stop: the first SIGTERM or SIGINT asks, the second insists, more change nothing."""

from __future__ import annotations

import asyncio
import signal

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Installs handlers in the running event loop; what comes after it is left, at a program's end, is ignored."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()

    def __enter__(self) -> StopSignals:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._received)
        return self

    def __exit__(self, *unused: object) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # or it would kill a program that is about to exit with 0

    def _received(self) -> None:
        if self.asked.is_set():
            self.insisted.set()
        self.asked.set()

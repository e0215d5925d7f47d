"""The rank's process: `python -m tandem.worker.rank_main FD`, started by the frontend, never by people.

FD is the rank's end of a Unix socket pair. The first message on it says who this rank is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import sys

from tandem.ipc import Channel, ChannelClosed
from tandem.worker.messages import TO_FRONTEND, TO_RANK, StartRank

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the rank that the pipe describes; returns the exit code."""
    parent = int(sys.argv[2])
    _die_with(parent)
    # A terminal's Ctrl-C and a supervisor's SIGTERM are the frontend's matter: it drains, then ends this process.
    # Handlers, not SIG_IGN, which the transfer process would inherit.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), TO_FRONTEND, TO_RANK)
    try:
        start = _first(channel)
    except ChannelClosed:
        return 0
    logging.basicConfig(
        level=start.config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from tandem.worker.rank import serve  # imports torch: after the signals and the parent are settled

    return serve(start, channel)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit(1)


def _first(channel: Channel) -> StartRank:
    while True:
        select.select([channel], [], [])
        for message in channel.receive():
            assert isinstance(message, StartRank), "a rank is told first who it is, and then nothing until it is ready"
            return message


if __name__ == "__main__":
    sys.exit(main())

"""The rank's process: `python -m tandem.worker.rank_main FD`, started by the frontend, never by people.

FD is the rank's end of a Unix socket pair. The first message on it says who this rank is.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys

from tandem.ipc import Channel, ChannelClosed
from tandem.telemetry import logging
from tandem.worker.follower_process import Follower
from tandem.worker.messages import TO_FRONTEND, TO_RANK, StartRank
from tandem.worker.parent_death import die_with


def main() -> int:
    """Run the rank that the pipe describes; returns the exit code."""
    parent = int(sys.argv[2])
    die_with(parent, signal.SIGKILL)
    # A terminal's Ctrl-C and a supervisor's SIGTERM are the frontend's matter: it drains, then ends this process.
    # Handlers, not SIG_IGN, which the transfer process would inherit.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), TO_FRONTEND, TO_RANK)
    try:
        start = _first(channel)
    except ChannelClosed:
        return 0
    server = start.config.server
    replica = "" if start.replica is None else f"/replica{start.replica}"
    logging.set_up(server.log_level, server.log_format, program=f"{start.role}{replica}/rank0")
    parallel = start.config.parallel
    num_here = parallel.tensor_size * parallel.pipeline_size - parallel.remote_ranks
    followers = [Follower.spawn(rank) for rank in range(1, num_here)]
    from tandem.worker.rank import serve  # imports torch: after the signals and the parent are settled

    return serve(start, channel, followers)


def _first(channel: Channel) -> StartRank:
    while True:
        select.select([channel], [], [])
        for message in channel.receive():
            assert isinstance(message, StartRank), "a rank is told first who it is, and then nothing until it is ready"
            return message


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)  # everything is closed; what the interpreter and torch would tidy up takes a second

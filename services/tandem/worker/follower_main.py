"""A follower's process: `python -m tandem.worker.follower_main FD PARENT`, started by rank 0, never by people.

FD is the follower's end of a Unix socket pair. The first message on it says which rank this is.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys

from tandem.ipc import Channel, ChannelClosed
from tandem.telemetry import logging
from tandem.worker.follower_messages import FROM_FOLLOWER, TO_FOLLOWER, StartFollower
from tandem.worker.parent_death import die_with


def main() -> int:
    """Run the follower that the channel describes; returns the exit code."""
    die_with(int(sys.argv[2]), signal.SIGKILL)
    # As with rank 0: how a worker ends is its frontend's matter.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    return follow(Channel(socket.socket(fileno=int(sys.argv[1])), FROM_FOLLOWER, TO_FOLLOWER))


def follow(leader: Channel) -> int:
    """Be the rank that the first message on the channel names; returns the exit code."""
    try:
        start = first_message(leader)
    except ChannelClosed:
        return 0
    server = start.config.server
    logging.set_up(server.log_level, server.log_format, program=f"{start.role}/rank{start.rank}")
    from tandem.worker.follower import serve  # imports torch: after the signals and the parent are settled

    return serve(start, leader)


def first_message(leader: Channel) -> StartFollower:
    """Wait for what rank 0 says first."""
    while True:
        select.select([leader], [], [])
        for message in leader.receive():
            assert isinstance(message, StartFollower), "a follower is told first who it is"
            return message


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)  # a compute thread may wait for ranks that are no more

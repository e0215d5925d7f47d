"""Rank 0's hold on one follower: the process, if it is on this host, its channel, and what it said last."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque

from tandem.ipc import Channel
from tandem.worker.follower_messages import FROM_FOLLOWER, TO_FOLLOWER, FollowerFailed

STDERR_LINES = 20  # kept to say why it died
EXIT_SECONDS = 0.5  # between the end of a channel and the end of its process
_LINE_BYTES = 1 << 16
_LAST_WORDS_SECONDS = 0.2


class Follower:
    """One follower. `child` is None for one that somebody else started; `where` says for people where it is."""

    def __init__(
        self, rank: int, channel: Channel, where: str = "", child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.rank = rank
        self.channel = channel
        self.heard = time.monotonic()
        self.failed: FollowerFailed | None = None
        self.is_gone = False
        self._where = where
        self._child = child
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        if child is not None:
            self._reader.start()

    @classmethod
    def spawn(cls, rank: int, command: tuple[str, ...] = ()) -> Follower:
        """Start the process; it dies with the calling thread. `command` is for tests."""
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(
                [
                    *(command or (sys.executable, "-m", "tandem.worker.follower_main")),
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
            )
        return cls(rank, Channel(ours, TO_FOLLOWER, FROM_FOLLOWER), child=child)

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def end(self) -> str:
        """How it ended, for people. Call once its channel is closed; waits for the process a little."""
        if self._child is None:
            return f"rank {self.rank} at {self._where} is gone: its connection ended"
        try:
            code = self._child.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"rank {self.rank} closed its channel and hangs"
        self._reader.join(_LAST_WORDS_SECONDS)  # its children may hold stderr open, nothing more
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        last_words = "\n".join(self._stderr)
        return f"rank {self.rank} ended {how}" + (f"; it said last:\n{last_words}" if last_words else "")

    def close(self, seconds: float) -> None:
        """Close its channel, which tells it to go; end it at once if it has not gone within `seconds`."""
        self.channel.close()
        if self._child is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)
            return
        self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(EXIT_SECONDS)

    def _read_stderr(self) -> None:
        """Pass stderr on, line by line, and keep its end."""
        assert self._child is not None and self._child.stderr is not None
        stderr = self._child.stderr
        while line := stderr.readline(_LINE_BYTES):
            self._stderr.append(line.decode(errors="replace").rstrip())
            sys.stderr.buffer.write(line)
            sys.stderr.flush()

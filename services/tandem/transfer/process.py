"""The rank's side of its transfer process: start it, talk to it, end it. It can be killed and spawned again."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys

from tandem.config import HandoffConfig, TlsConfig, TransferConfig
from tandem.ipc import Channel
from tandem.transfer.channel import COMMANDS, OUTCOMES, Launch
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory

_END_SECONDS = 1.0
_KILL_SECONDS = 5.0


class TransferProcess:
    """Owns the child and the channel. When `channel` raises ChannelClosed, call `stop`, then spawn another.

    The first outcome is TransferReady; commands sent before it wait. After `stop` nothing can arrive in the pool.
    """

    def __init__(self, child: subprocess.Popen[bytes], channel: Channel) -> None:
        self._child = child
        self.channel = channel

    @classmethod
    def spawn(
        cls,
        config: TransferConfig,
        handoff: HandoffConfig,
        memory: PoolMemory,
        layout: KvLayout,
        worker_host: str,
        tls: TlsConfig | None = None,
    ) -> TransferProcess:
        """Start a process that maps `memory` and returns at once. It dies with the thread that called this.

        `worker_host` is the address that peers reach this worker at; config.host overrides it.
        """
        own_end, child_end = socket.socketpair()
        with child_end:
            launch = Launch(
                transfer=config,
                handoff=handoff,
                tls=tls or TlsConfig(),
                layout=layout,
                worker_host=worker_host,
                memory_fd=memory.fd,
                memory_pages=memory.pages,
                channel_fd=child_end.fileno(),
            )
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", "tandem.transfer.main", launch.encode()],
                    stdin=subprocess.DEVNULL,
                    close_fds=True,
                    pass_fds=(memory.fd, child_end.fileno()),
                )
            except BaseException:
                own_end.close()
                raise
        return cls(child, Channel(own_end, outgoing=COMMANDS, incoming=OUTCOMES))

    @property
    def pid(self) -> int:
        return self._child.pid

    def stop(self) -> None:
        """End it and reap it, within a few seconds: closing the channel tells it to go, then it is killed."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_END_SECONDS)
            return
        self._child.kill()
        self._child.wait(_KILL_SECONDS)

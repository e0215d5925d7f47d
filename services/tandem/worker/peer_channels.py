"""Channels to prefill workers: one an address, shared by its hand-offs, closed when idle, bounded in number.

After a change of the certificates a hand-off gets a new channel; those that run keep theirs.
A channel that cannot connect is forgotten, so that the next hand-off tries afresh instead of sitting out a backoff.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
from grpc import aio

from tandem.errors import Unavailable
from tandem.rpc.channels import open_channel, why_not_connected
from tandem.rpc.tls import ClientTls

MAX_CHANNELS = 1024
IDLE_SECONDS = 60.0
HANDOFF_MESSAGE_BYTES = 64 << 20


@dataclass(slots=True)
class _Entry:
    channel: aio.Channel
    credentials: grpc.ChannelCredentials | None = None
    users: int = 0
    closing: asyncio.TimerHandle | None = field(default=None)


class PeerChannels:
    """The pool. Use it in one event loop; `close` ends every channel, and with it every stream on one."""

    def __init__(
        self, connect_seconds: float, idle_seconds: float = IDLE_SECONDS, tls: ClientTls | None = None
    ) -> None:
        self._connect_seconds = connect_seconds
        self._idle_seconds = idle_seconds
        self._tls = tls
        self._entries: dict[str, _Entry] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @contextlib.asynccontextmanager
    async def connected(self, address: str) -> AsyncIterator[aio.Channel]:
        """Lend a connected channel. Raises Unavailable if the peer cannot be reached in `connect_seconds`."""
        entry = self._take(address)
        try:
            try:
                async with asyncio.timeout(self._connect_seconds):
                    await self._wait_connected(entry.channel, address)
            except (TimeoutError, Unavailable) as error:
                self._forget(address, entry)
                if isinstance(error, Unavailable):
                    raise
                raise Unavailable(f"{address} cannot be reached within {self._connect_seconds:g} s") from error
            yield entry.channel
        finally:
            self._give_back(address, entry)

    async def close(self) -> None:
        """Close every channel."""
        entries, self._entries = list(self._entries.values()), {}
        for entry in entries:
            if entry.closing is not None:
                entry.closing.cancel()
            await entry.channel.close()
        if self._closing:
            await asyncio.wait(self._closing)

    def _take(self, address: str) -> _Entry:
        entry = self._entries.get(address)
        credentials = self._tls.credentials() if self._tls is not None else None
        if entry is not None and entry.credentials is not credentials:
            self._forget(address, entry)
            if not entry.users:
                self._dispose(entry)  # else the last user does
            entry = None
        if entry is None:
            self._make_room()
            channel = open_channel(
                address,
                max_message_bytes=HANDOFF_MESSAGE_BYTES,
                tls=self._tls,
                connect_seconds=self._connect_seconds + 1.0,  # the library's bound is not to be met before ours
            )
            entry = self._entries[address] = _Entry(channel, credentials)
        if entry.closing is not None:
            entry.closing.cancel()
            entry.closing = None
        entry.users += 1
        return entry

    def _make_room(self) -> None:
        if len(self._entries) < MAX_CHANNELS:
            return
        for address, entry in self._entries.items():
            if not entry.users:
                self._forget(address, entry)
                self._dispose(entry)
                return
        raise Unavailable(f"hand-offs with {MAX_CHANNELS} prefill workers are open already")

    def _give_back(self, address: str, entry: _Entry) -> None:
        entry.users -= 1
        if entry.users:
            return
        if self._entries.get(address) is entry:
            loop = asyncio.get_running_loop()
            entry.closing = loop.call_later(self._idle_seconds, self._expire, address, entry)
        else:
            self._dispose(entry)

    def _expire(self, address: str, entry: _Entry) -> None:
        self._forget(address, entry)
        self._dispose(entry)

    def _forget(self, address: str, entry: _Entry) -> None:
        if self._entries.get(address) is entry:
            del self._entries[address]

    async def _wait_connected(self, channel: aio.Channel, address: str) -> None:
        """Return once the channel is ready; raise Unavailable as soon as a try to connect has failed."""
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                reason = await why_not_connected(channel, secure=self._tls is not None)
                raise Unavailable(f"{address} cannot be reached" + (f": {reason}" if reason else ""))
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)

    def _dispose(self, entry: _Entry) -> None:
        if entry.closing is not None:
            entry.closing.cancel()
        task = asyncio.create_task(entry.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

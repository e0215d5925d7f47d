"""Typed, bounded frames between the processes of one pod, over a Unix stream socket.

Each message is a frozen dataclass of the channel's `Schema`. A frame is a 4-byte little-endian length and a msgpack
array [index of the class in the schema, fields]; the receiver validates every field against the class's types.
Standard library and msgspec only, so that every process of a worker can afford it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

MAX_FRAME_BYTES = 64 << 20
MAX_PENDING_BYTES = 256 << 20
_RECEIVE_BYTES = 1 << 18
_LENGTH = struct.Struct("<I")


class ChannelClosed(Exception):
    """The other process is gone."""


class Schema:
    """The closed set of message classes that one direction of a channel carries; the order is the wire form."""

    def __init__(self, classes: Sequence[type]) -> None:
        self._index = {cls: i for i, cls in enumerate(classes)}
        self._decoders: list[msgspec.msgpack.Decoder[Any]] = [msgspec.msgpack.Decoder(cls) for cls in classes]
        self._encoder = msgspec.msgpack.Encoder()
        self._envelope = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw])

    def encode(self, message: object) -> bytes:
        payload = self._encoder.encode((self._index[type(message)], message))
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"{type(message).__name__} of {len(payload)} bytes exceeds the frame limit")
        return _LENGTH.pack(len(payload)) + payload

    def decode(self, payload: bytes | memoryview) -> Any:
        index, raw = self._envelope.decode(payload)
        return self._decoders[index].decode(raw)


class FrameReader:
    """Cuts a byte stream into messages. Feed it what arrives."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Return the messages that `data` completes; raises ValueError on a frame over the limit."""
        self._buffer += data
        messages: list[Any] = []
        offset = 0
        while len(self._buffer) - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, offset)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes exceeds the limit")
            end = offset + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._schema.decode(bytes(self._buffer[offset + _LENGTH.size : end])))
            offset = end
        del self._buffer[:offset]
        return messages


class Channel:
    """One end of a pod-internal pipe, for a loop that never blocks: `send` queues, `flush` writes what fits.

    Register `fileno()` for reading with a selector, and for writing while `pending_bytes` is not zero.
    Raises ChannelClosed from every call once the other side is gone, or has not read MAX_PENDING_BYTES.
    """

    def __init__(self, sock: socket.socket, outgoing: Schema, incoming: Schema) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._outgoing = outgoing
        self._reader = FrameReader(incoming)
        self._pending = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending_bytes(self) -> int:
        return len(self._pending)

    def send(self, message: object) -> None:
        """Queue a message; call `flush` after a batch."""
        self._pending += self._outgoing.encode(message)
        if len(self._pending) > MAX_PENDING_BYTES:
            raise ChannelClosed(f"the other process has not read {len(self._pending)} bytes")

    def flush(self) -> None:
        """Write what the socket takes now."""
        try:
            while self._pending:
                sent = self._socket.send(self._pending)
                del self._pending[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> list[Any]:
        """Return the messages that have arrived, maybe none."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not data:
            raise ChannelClosed("the other process closed its end")
        return self._reader.feed(data)

    def close(self) -> None:
        self._socket.close()

"""Wire format of the plain TCP transport: fixed structs, little-endian, every length bounded. No I/O here.

    importer: Hello                      exporter: Welcome          (with a shared key: a proof each, importer first)
    importer: Request                    exporter: Frame*           until all pages are sent, or one that refuses

A response is the requested pieces of pages as one byte stream, cut into frames. One request at a time on a connection.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tandem.errors import TransportError

VERSION = 1
MAX_FRAME_BYTES = 4 << 20
MAX_MESSAGE_BYTES = 256
MAX_ORDINALS = 1 << 16
MAX_ID_BYTES = 64
INSTANCE_BYTES = 16
NONCE_BYTES = 32
PROOF_BYTES = 32

_MAGIC = b"TdKV"
_HELLO = struct.Struct(f"<4sHH{INSTANCE_BYTES}s{NONCE_BYTES}s")
# What an exporter sends is padded to whole cache lines: the kernel copies bodies that are not aligned 5 % slower.
_WELCOME = struct.Struct(f"<4sHBB{INSTANCE_BYTES}s{NONCE_BYTES}s8x")
_REQUEST = struct.Struct("<4sBBBBIIQQ")  # a whole page is piece 0
_FRAME = struct.Struct("<4sIIIQ40x")

HELLO_BYTES = _HELLO.size
WELCOME_BYTES = _WELCOME.size
REQUEST_BYTES = _REQUEST.size
FRAME_BYTES = _FRAME.size


class ProtocolError(TransportError):
    """The peer sent something that this protocol does not have."""


class Status(IntEnum):
    OK = 0
    REFUSED = 1  # hand-off, attempt, token or an ordinal is not one that is served
    WRONG_INSTANCE = 2  # another process listens on this address now


@dataclass(frozen=True, slots=True)
class Hello:
    """`instance_id` is the exporter that the importer means to reach."""

    instance_id: bytes
    nonce: bytes

    def encode(self) -> bytes:
        return _HELLO.pack(_MAGIC, VERSION, 0, self.instance_id, self.nonce)

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        magic, version, _, instance_id, nonce = _HELLO.unpack(data)
        _check_magic(magic, version)
        return cls(instance_id, nonce)


@dataclass(frozen=True, slots=True)
class Welcome:
    status: Status
    wants_proof: bool
    instance_id: bytes
    nonce: bytes

    def encode(self) -> bytes:
        return _WELCOME.pack(_MAGIC, VERSION, self.status, self.wants_proof, self.instance_id, self.nonce)

    @classmethod
    def decode(cls, data: bytes) -> Welcome:
        magic, version, status, wants_proof, instance_id, nonce = _WELCOME.unpack(data)
        _check_magic(magic, version)
        return cls(_status(status), bool(wants_proof), instance_id, nonce)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    """What precedes handoff_id, token and ordinals; `body_bytes` of them follow. `piece_bytes`: of each page."""

    handoff_id_bytes: int
    token_bytes: int
    sequence: int
    num_ordinals: int
    attempt: int
    piece: int
    piece_bytes: int

    @property
    def body_bytes(self) -> int:
        return self.handoff_id_bytes + self.token_bytes + 4 * self.num_ordinals

    @classmethod
    def decode(cls, data: bytes) -> RequestHead:
        magic, id_bytes, token_bytes, version, piece, sequence, num_ordinals, attempt, size = _REQUEST.unpack(data)
        _check_magic(magic, version)
        if not 0 < num_ordinals <= MAX_ORDINALS or id_bytes > MAX_ID_BYTES or token_bytes > MAX_ID_BYTES:
            raise ProtocolError("a request is over the limits")
        return cls(
            handoff_id_bytes=id_bytes,
            token_bytes=token_bytes,
            sequence=sequence,
            num_ordinals=num_ordinals,
            attempt=attempt,
            piece=piece,
            piece_bytes=size,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    sequence: int
    handoff_id: bytes
    attempt: int
    token: bytes
    piece_bytes: int
    ordinals: npt.NDArray[np.int64]
    piece: int = 0

    def encode(self) -> bytes:
        head = _REQUEST.pack(
            _MAGIC,
            len(self.handoff_id),
            len(self.token),
            VERSION,
            self.piece,
            self.sequence,
            len(self.ordinals),
            self.attempt,
            self.piece_bytes,
        )
        return head + self.handoff_id + self.token + self.ordinals.astype("<u4").tobytes()

    @classmethod
    def decode(cls, head: RequestHead, body: bytes) -> Request:
        token_end = head.handoff_id_bytes + head.token_bytes
        return cls(
            sequence=head.sequence,
            handoff_id=body[: head.handoff_id_bytes],
            attempt=head.attempt,
            token=body[head.handoff_id_bytes : token_end],
            piece=head.piece,
            piece_bytes=head.piece_bytes,
            ordinals=np.frombuffer(body, dtype="<u4", offset=token_end).astype(np.int64),
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """Header of `length` bytes: stream bytes from `offset` on if OK, else a message, and the response ends."""

    sequence: int
    status: Status
    length: int
    offset: int = 0

    def encode(self) -> bytes:
        return _FRAME.pack(_MAGIC, self.sequence, self.status, self.length, self.offset)

    @classmethod
    def decode(cls, data: bytes) -> Frame:
        magic, sequence, status, length, offset = _FRAME.unpack(data)
        _check_magic(magic, VERSION)
        frame = cls(sequence, _status(status), length, offset)
        if length > (MAX_FRAME_BYTES if frame.status is Status.OK else MAX_MESSAGE_BYTES):
            raise ProtocolError(f"a frame of {length} bytes is over the limit")
        return frame


def _check_magic(magic: bytes, version: int) -> None:
    if magic != _MAGIC or version != VERSION:
        raise ProtocolError("the peer does not speak this version of the KV protocol")


def _status(value: int) -> Status:
    try:
        return Status(value)
    except ValueError as error:
        raise ProtocolError(f"unknown status {value}") from error

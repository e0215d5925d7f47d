"""Token ids in their packed form: little-endian uint32, four bytes each, as they travel on every wire."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

BYTES_PER_TOKEN = 4
_TYPECODE = "I"
assert array(_TYPECODE).itemsize == BYTES_PER_TOKEN


def pack(token_ids: Iterable[int]) -> bytes:
    """Pack ids; raises OverflowError for one outside [0, 2**32)."""
    packed = array(_TYPECODE, token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> list[int]:
    """Unpack ids; raises ValueError if the length is no multiple of four."""
    ids = array(_TYPECODE)
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()

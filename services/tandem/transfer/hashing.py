"""Page checksums: xxh3-64 over a whole page, packed as little-endian uint64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from tandem.transfer.pages import Pages

ALGORITHM = "xxh3-64"


def hashes(pages: Pages) -> npt.NDArray[np.uint64]:
    """Return one checksum a page."""
    rows, digest = pages.space.rows, xxhash.xxh3_64_intdigest
    return np.fromiter((digest(rows[number]) for number in pages.numbers), dtype=np.uint64, count=len(pages.numbers))


def pack(checksums: npt.NDArray[np.uint64]) -> bytes:
    return checksums.astype("<u8").tobytes()


def unpack(packed: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(packed, dtype="<u8").astype(np.uint64)

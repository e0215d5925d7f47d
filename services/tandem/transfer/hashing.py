"""Page checksums: xxh3-64 over a page, or over one slab of it in pool order; packed as little-endian uint64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from tandem.core.messages.transfer import Slab
from tandem.transfer.pages import Pages

ALGORITHM = "xxh3-64"


def hashes(pages: Pages) -> npt.NDArray[np.uint64]:
    """Return one checksum a page."""
    rows, slab, digest = pages.space.rows, pages.slab, xxhash.xxh3_64_intdigest
    if slab.num_runs == 1:
        parts = rows[:, slab.offset : slab.end]
        return np.fromiter((digest(parts[number]) for number in pages.numbers), np.uint64, len(pages.numbers))
    # Gathered first: hashing run by run costs a Python call each, which is far more than the copy.
    gathered = np.empty((slab.num_runs, slab.run_bytes), dtype=np.uint8)
    found = np.empty(len(pages.numbers), dtype=np.uint64)
    for index, number in enumerate(pages.numbers):
        np.copyto(gathered, _runs(rows[number], slab))
        found[index] = digest(gathered.data)
    return found


def _runs(row: npt.NDArray[np.uint8], slab: Slab) -> npt.NDArray[np.uint8]:
    """View a slab of one page as [run, byte]."""
    return np.lib.stride_tricks.as_strided(
        row[slab.offset :], (slab.num_runs, slab.run_bytes), (slab.stride, 1), writeable=False
    )


def pack(checksums: npt.NDArray[np.uint64]) -> bytes:
    return checksums.astype("<u8").tobytes()


def unpack(packed: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(packed, dtype="<u8").astype(np.uint64)

"""Pages in this process's memory: a mapped region cut into rows of equal size, and choices of its rows, or of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.core.messages.transfer import Slab

Bytes2D = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class PageSpace:
    """A writable region as `rows[page]`, uint8. It keeps the region alive."""

    def __init__(self, view: memoryview, page_bytes: int) -> None:
        num_pages = len(view) // page_bytes
        flat = np.frombuffer(view, dtype=np.uint8, count=num_pages * page_bytes)
        self.rows: Bytes2D = flat.reshape(num_pages, page_bytes)
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.address = int(flat.ctypes.data)

    @property
    def whole(self) -> Slab:
        """All of a page."""
        return Slab(0, self.page_bytes, self.page_bytes, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Some pages of a space, or one slab of each, in the order of a transfer. One byte stream, page after page."""

    space: PageSpace
    numbers: Numbers
    slab: Slab

    @classmethod
    def of(cls, space: PageSpace, numbers: Sequence[int] | Numbers, slab: Slab | None = None) -> Pages:
        """Check numbers and slab against the space; raises ValueError, since a wrong one would hit foreign memory."""
        array = np.asarray(numbers, dtype=np.int64)
        if array.size and (int(array.min()) < 0 or int(array.max()) >= space.num_pages):
            raise ValueError(f"page number outside [0, {space.num_pages})")
        if slab is not None:
            check_slab(slab, space.page_bytes)
        return cls(space, array, slab or space.whole)

    @property
    def bytes_each(self) -> int:
        """What one page is in the stream."""
        return self.slab.num_bytes

    @property
    def num_bytes(self) -> int:
        return len(self.numbers) * self.bytes_each

    @property
    def addresses(self) -> npt.NDArray[np.uint64]:
        """Of every run of every page."""
        return slab_addresses(self.numbers.astype(np.uint64), self.space.address, self.space.page_bytes, self.slab)

    def part(self, begin: int, end: int) -> Pages:
        return Pages(self.space, self.numbers[begin:end], self.slab)


def check_slab(slab: Slab, page_bytes: int) -> None:
    """Raise ValueError for a slab that is empty, overlaps itself, or does not lie inside a page."""
    if slab.num_runs < 1 or slab.run_bytes < 1 or slab.offset < 0 or slab.end > page_bytes:
        raise ValueError(f"{slab} is not inside a page of {page_bytes} bytes")
    if slab.num_runs > 1 and slab.stride < slab.run_bytes:
        raise ValueError(f"the runs of {slab} overlap")


def slab_addresses(numbers: npt.NDArray[np.uint64], base: int, page_bytes: int, slab: Slab) -> npt.NDArray[np.uint64]:
    """Return where each run begins: of the slab in each page of a pool at `base`, page after page."""
    first = numbers * np.uint64(page_bytes) + np.uint64(base + slab.offset)
    if slab.num_runs == 1:
        return first
    return (first[:, None] + np.arange(slab.num_runs, dtype=np.uint64) * np.uint64(slab.stride)).reshape(-1)

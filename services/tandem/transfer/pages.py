"""Pages in this process's memory: a mapped region cut into rows of equal size, and choices of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Some pages of a space, in the order of a transfer. Seen as one byte stream, page after page."""

    space: PageSpace
    numbers: Numbers

    @classmethod
    def of(cls, space: PageSpace, numbers: Sequence[int] | Numbers) -> Pages:
        """Check the page numbers against the space; raises ValueError, since a wrong one would hit foreign memory."""
        array = np.asarray(numbers, dtype=np.int64)
        if array.size and (int(array.min()) < 0 or int(array.max()) >= space.num_pages):
            raise ValueError(f"page number outside [0, {space.num_pages})")
        return cls(space, array)

    @property
    def num_bytes(self) -> int:
        return len(self.numbers) * self.space.page_bytes

    @property
    def addresses(self) -> npt.NDArray[np.uint64]:
        return (self.numbers * self.space.page_bytes + self.space.address).astype(np.uint64)

    def part(self, begin: int, end: int) -> Pages:
        return Pages(self.space, self.numbers[begin:end])

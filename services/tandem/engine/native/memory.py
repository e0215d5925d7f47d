"""Memory of the operators library as tensors: packed weights, and large results whose pages are used again.

Fresh pages cost a fault each, which dominates large results that are made and dropped in every layer.
"""

from __future__ import annotations

import ctypes
from bisect import insort
from collections import deque
from typing import Any

import torch

SMALL_BYTES = 128 << 10  # below, torch's own allocator keeps its pages


class NativePages:
    """`num_bytes` of page-aligned memory, in huge pages where the system gives them; released with this object."""

    def __init__(self, library: ctypes.CDLL, num_bytes: int) -> None:
        self._library = library
        self.num_bytes = num_bytes
        self.address: int = library.tandem_allocate(num_bytes) or 0
        if not self.address:
            raise MemoryError(f"no memory for {num_bytes} bytes of operators")

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._library.tandem_release(self.address, self.num_bytes)


class RecycledTensors:
    """Makes float32 tensors whose memory comes back when the last tensor over it is gone.

    As many blocks are kept as were in use at once. `empty` is for one thread at a time; tensors may be dropped by any.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._returned: deque[NativePages] = deque()
        self._free: list[tuple[int, int, NativePages]] = []  # by size

    def empty(self, rows: int, columns: int) -> torch.Tensor:
        """An uninitialized tensor [rows, columns]; raises MemoryError."""
        num_bytes = rows * columns * 4
        if num_bytes < SMALL_BYTES:
            return torch.empty((rows, columns), dtype=torch.float32)
        pages = self._take(num_bytes)
        block = _block_type(num_bytes).from_address(pages.address)
        block.pages, block.returned = pages, self._returned
        return torch.frombuffer(block, dtype=torch.float32).view(rows, columns)

    @property
    def num_bytes(self) -> int:
        """Bytes that are free to be used again."""
        self._collect()
        return sum(pages.num_bytes for _, _, pages in self._free)

    def _take(self, num_bytes: int) -> NativePages:
        self._collect()
        for index, (size, _, pages) in enumerate(self._free):
            if size >= num_bytes:
                del self._free[index]
                return pages
        if self._free:
            self._free.pop()  # all are too small: a larger one takes the place of one of them
        return NativePages(self._library, num_bytes)

    def _collect(self) -> None:
        while self._returned:
            pages = self._returned.popleft()
            insort(self._free, (pages.num_bytes, pages.address, pages))


_BLOCK_TYPES: dict[int, Any] = {}
_BLOCK_TYPES_MAX = 4096


def _block_type(num_bytes: int) -> Any:
    """A ctypes array that gives its pages back when it goes; torch holds it as long as the memory is in use."""
    found = _BLOCK_TYPES.get(num_bytes)
    if found is None:
        if len(_BLOCK_TYPES) >= _BLOCK_TYPES_MAX:
            _BLOCK_TYPES.clear()
        found = type("Block", (ctypes.c_char * num_bytes,), {"__del__": _give_back})
        _BLOCK_TYPES[num_bytes] = found
    return found


def _give_back(block: Any) -> None:
    block.returned.append(block.pages)

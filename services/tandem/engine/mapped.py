"""Tensors that are mapped from files: their pages can be given back, and come again when they are touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4


class MappedFiles:
    """Where this process has some files mapped. Linux; elsewhere nothing is ever given back."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._names = {str(path.resolve()) for path in paths}
        self._ranges: list[tuple[int, int]] = []
        self._libc = ctypes.CDLL(None)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def forget(self, tensor: torch.Tensor) -> bool:
        """Give back the whole pages of a tensor that lies in one of the files; False if it does not, or too small.

        Its values stay: whoever reads them has them read from the file again. Nobody may have written to them.
        """
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not self._is_mapped(start, end):
            return False
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        return size > 0 and self._libc.madvise(first, size, _DONTNEED) == 0

    def _is_mapped(self, start: int, end: int) -> bool:
        if not any(low <= start and end <= high for low, high in self._ranges):
            self._ranges = list(_ranges(self._names))
        return any(low <= start and end <= high for low, high in self._ranges)


def _ranges(names: set[str]) -> list[tuple[int, int]]:
    """Return the address ranges of these files, adjacent ones of one file as one."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] not in names:
            continue
        low, high = (int(bound, 16) for bound in fields[0].split("-"))
        if found and found[-1][1] == low:
            low = found.pop()[0]
        found.append((low, high))
    return found

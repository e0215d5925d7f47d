"""Scatter-gather between a socket and pages: iovec arrays built by numpy, passed to the kernel through ctypes.

The calls release the GIL, and no Python object exists per page.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tandem.transfer.pages import Pages

MAX_IOVECS = 1024  # IOV_MAX of Linux

Iovecs = npt.NDArray[np.uint64]  # [n, 2]: address, length; the layout of struct iovec on 64-bit Linux


class _MessageHeader(ctypes.Structure):
    _fields_ = (
        ("msg_name", ctypes.c_void_p),
        ("msg_namelen", ctypes.c_uint32),
        ("msg_iov", ctypes.c_void_p),
        ("msg_iovlen", ctypes.c_size_t),
        ("msg_control", ctypes.c_void_p),
        ("msg_controllen", ctypes.c_size_t),
        ("msg_flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    _call.restype = ctypes.c_ssize_t


class Runs:
    """Runs of equal length as one byte stream over memory, adjacent ones coalesced. Whoever uses it keeps that."""

    def __init__(self, addresses: npt.NDArray[np.uint64], run_bytes: int) -> None:
        is_head = np.ones(len(addresses), dtype=bool)
        is_head[1:] = addresses[1:] != addresses[:-1] + np.uint64(run_bytes)
        heads = np.flatnonzero(is_head)
        ends = np.append(heads, len(addresses)).astype(np.int64) * run_bytes
        self._offsets: list[int] = ends.tolist()  # run i: stream bytes [offsets[i], offsets[i + 1])
        self._vectors: Iovecs = np.empty((len(heads), 2), dtype=np.uint64)
        self._vectors[:, 0] = addresses[heads]
        self._vectors[:, 1] = np.diff(ends)

    @classmethod
    def of(cls, pages: Pages) -> Runs:
        return cls(pages.addresses, pages.slab.run_bytes)

    def iovecs(self, begin: int, end: int) -> Iovecs:
        """Return the memory of stream bytes [begin, end)."""
        offsets = self._offsets
        first = bisect_right(offsets, begin) - 1
        last = bisect_left(offsets, end, first)
        vectors = self._vectors[first:last].copy()
        if skipped := begin - offsets[first]:
            vectors[0, 0] += np.uint64(skipped)
            vectors[0, 1] -= np.uint64(skipped)
        if offsets[last] > end:
            vectors[-1, 1] -= np.uint64(offsets[last] - end)
        return vectors


def of_buffer(buffer: npt.NDArray[np.uint8]) -> Iovecs:
    """Return the one iovec of a contiguous buffer; keep that alive."""
    return np.array([[buffer.ctypes.data, buffer.nbytes]], dtype=np.uint64)


def advance(vectors: Iovecs, count: int) -> Iovecs:
    """Return what is left after `count` bytes."""
    ends = np.cumsum(vectors[:, 1])
    first = int(np.searchsorted(ends, count, side="right"))
    left = vectors[first:].copy()
    if len(left):
        done = np.uint64(count) - (ends[first] - left[0, 1])
        left[0, 0] += done
        left[0, 1] -= done
    return left


def send(sock: socket.socket, vectors: Iovecs) -> int:
    """Write from memory; return how many bytes the socket took, 0 if its send time-out passed. Raises OSError."""
    return _transfer(_libc.sendmsg, sock, vectors, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, vectors: Iovecs) -> int:
    """Read into memory until full or the receive time-out passed: 0 if nothing came. Raises OSError, also at EOF."""
    return _transfer(_libc.recvmsg, sock, vectors, socket.MSG_WAITALL)


def _transfer(call: Callable[..., int], sock: socket.socket, vectors: Iovecs, flags: int) -> int:
    header = _MessageHeader(msg_iov=vectors.ctypes.data, msg_iovlen=min(len(vectors), MAX_IOVECS))
    while True:
        count = int(call(sock.fileno(), ctypes.byref(header), flags))
        if count > 0:
            return count
        if count == 0:
            raise ConnectionResetError(errno.ECONNRESET, "the peer closed the connection")
        code = ctypes.get_errno()
        if code in (errno.EAGAIN, errno.EWOULDBLOCK):
            return 0
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))

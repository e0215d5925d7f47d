"""The KV pool as shared memory: a memfd that the rank creates and its transfer process maps by descriptor."""

from __future__ import annotations

import contextlib
import mmap
import os


class PoolMemory:
    """One mapping of a pool. `view` is writable; the pages live until the last descriptor and mapping are gone."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # Attention jumps from page to page of the pool: without huge pages nearly every jump misses the TLB. They are
        # advice, and only where /sys/kernel/mm/transparent_hugepage/shmem_enabled is advise.
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)

    @classmethod
    def create(cls, size_bytes: int) -> PoolMemory:
        """Reserve `size_bytes` of zeroed shared memory. The descriptor is close-on-exec; pass it with `pass_fds`."""
        fd = os.memfd_create("tandem-kv-pool", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        return cls(fd, size_bytes)

    @classmethod
    def attach(cls, fd: int) -> PoolMemory:
        """Map a pool that another process created; takes ownership of `fd`."""
        return cls(fd, os.fstat(fd).st_size)

    @property
    def view(self) -> memoryview:
        return memoryview(self._map)

    def close(self) -> None:
        """Close the descriptor. The mapping goes with its last view."""
        os.close(self.fd)

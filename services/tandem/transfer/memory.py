"""The KV pool as shared memory: a memfd that the rank creates and its transfer process maps by descriptor.

Attention jumps from page to page of the pool: in pages of 4 KB nearly every jump misses the TLB. So a pool lies in
huge pages that the machine has reserved, where there are enough, and asks for transparent ones elsewhere.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable
from typing import Literal

from tandem.config import HugePages
from tandem.errors import ConfigError
from tandem.transfer.huge_pages import HUGE_PAGE_BYTES, advice_is_heeded, free_huge_pages, pages_needed

PoolPages = Literal["huge", "advised", "ordinary"]  # reserved; ordinary until the kernel follows the advice; ordinary
_NAME = "tandem-kv-pool"


class PoolMemory:
    """One mapping of a pool. `view` is writable; the pages live until the last descriptor and mapping are gone.

    `size_bytes` is what was asked for; in huge pages the file and its mapping end at the next multiple of them.
    """

    def __init__(self, fd: int, size_bytes: int, pages: PoolPages) -> None:
        """Takes ownership of `fd`, unless it raises: ValueError if the file is shorter than `size_bytes`, OSError."""
        self.fd = fd
        self.size_bytes = size_bytes
        self.pages = pages
        file_bytes = os.fstat(fd).st_size
        if file_bytes < size_bytes:
            raise ValueError(f"a pool of {size_bytes} bytes in a file of {file_bytes}")
        self._map = mmap.mmap(fd, file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        if pages == "advised":
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)

    @classmethod
    def create(cls, size_bytes: int, *, advise: bool = True) -> PoolMemory:
        """Map `size_bytes` of zeroed shared memory in ordinary pages, taken as they are touched.

        `advise` asks for huge ones where the kernel listens to that. The descriptor is close-on-exec; pass it with
        `pass_fds`.
        """
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            return cls(fd, size_bytes, "advised" if advise and advice_is_heeded() else "ordinary")
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def create_huge(cls, size_bytes: int) -> PoolMemory:
        """Map `size_bytes` of zeroed shared memory in reserved huge pages; raises OSError if they are not to be had.

        All of them are taken here. A mapping alone takes none: one that a container's limit forbids would be a SIGBUS
        when it is touched.
        """
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        try:
            file_bytes = pages_needed(size_bytes) * HUGE_PAGE_BYTES
            os.ftruncate(fd, file_bytes)
            os.posix_fallocate(fd, 0, file_bytes)
            return cls(fd, size_bytes, "huge")
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, size_bytes: int, pages: PoolPages) -> PoolMemory:
        """Map a pool that another process created and described; takes ownership of `fd`."""
        return cls(fd, size_bytes, pages)

    @property
    def view(self) -> memoryview:
        return memoryview(self._map)[: self.size_bytes]

    def close(self) -> None:
        """Close the descriptor. The mapping goes with its last view."""
        os.close(self.fd)


def reserve_pool(
    size_bytes: int,
    wish: HugePages,
    progress: Callable[[str], None] = lambda text: None,
    *,
    free_pages: Callable[[], int] = free_huge_pages,
    create_huge: Callable[[int], PoolMemory] = PoolMemory.create_huge,
) -> PoolMemory:
    """Return the memory of a pool in the best pages that `wish` (cache.huge_pages) allows.

    Raises ConfigError if huge ones are required and not to be had. `progress` gets why they were not, if there are
    some. `free_pages` and `create_huge` are for tests.
    """
    if wish == "off":
        return PoolMemory.create(size_bytes, advise=False)
    free, needed = free_pages(), pages_needed(size_bytes)
    lack = f"the KV pool needs {needed} huge pages of 2 MB, {free} are free"
    if free >= needed:
        try:
            return create_huge(size_bytes)
        except OSError as error:
            lack += f", but the kernel refuses them ({error.strerror}; is this container's limit lower?)"
    if wish == "require":
        raise ConfigError(
            f"cache.huge_pages: {lack}. Reserve them (sysctl vm.nr_hugepages; in Kubernetes also "
            "resources.limits.hugepages-2Mi), make the pool smaller (cache.pool_bytes), or set auto: then ordinary "
            "pages do, for huge ones where /sys/kernel/mm/transparent_hugepage/shmem_enabled is advise"
        )
    if free:
        progress(f"{lack}: it gets ordinary ones")
    return PoolMemory.create(size_bytes)


def common_pages(pools: Iterable[str]) -> str:
    """What several pools lie in: PoolPages, or `mixed`."""
    kinds = set(pools)
    return kinds.pop() if len(kinds) == 1 else "mixed"


def describe_pages(pages: str) -> str:
    """PoolPages in words."""
    ordinary = f"pages of {mmap.PAGESIZE >> 10} KB"
    return {"huge": "huge pages of 2 MB", "advised": f"{ordinary}, huge ones advised"}.get(pages, ordinary)

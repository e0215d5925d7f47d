"""Huge pages of 2 MB: what this machine has of them, reserved ones and those that the kernel makes up by itself.

Every function takes the root of the file system, so that tests can lay out a machine of their own.
"""

from __future__ import annotations

from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20
_ROOT = Path("/")
_RESERVED = "sys/kernel/mm/hugepages/hugepages-2048kB"
_TRANSPARENT = "sys/kernel/mm/transparent_hugepage"
_HEEDED = frozenset({"advise", "within_size", "always", "force"})


def pages_needed(size_bytes: int) -> int:
    return -(-size_bytes // HUGE_PAGE_BYTES)


def free_huge_pages(root: Path = _ROOT) -> int:
    """Pages that a program can still take: reserved ones that nobody has or was promised, and surplus that is allowed.

    A container's own limit is not looked at: who takes pages hears of it from the kernel.
    """
    folder = root / _RESERVED
    free = _number(folder / "free_hugepages") - _number(folder / "resv_hugepages")
    surplus = _number(folder / "nr_overcommit_hugepages") - _number(folder / "surplus_hugepages")
    return max(0, free) + max(0, surplus)


def shmem_choice(root: Path = _ROOT) -> str:
    """When the kernel puts shared memory into transparent huge pages, in its own word; empty where it never can."""
    general = _chosen(root / _TRANSPARENT / "shmem_enabled")
    own = _chosen(root / _TRANSPARENT / "hugepages-2048kB" / "shmem_enabled")  # newer kernels: for each size
    return general if general in ("deny", "force") or own in ("", "inherit") else own


def advice_is_heeded(root: Path = _ROOT) -> bool:
    """Whether shared memory that asks for huge pages by madvise may get them."""
    return shmem_choice(root) in _HEEDED


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _chosen(path: Path) -> str:
    """The word in brackets."""
    try:
        text = path.read_text()
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]

"""The C library's allocator, told to keep what a step frees, since the next step needs as much.

Without this, torch's temporaries of some megabytes are given back to the system at the end of every step, and the next
one pays a page fault for each 4 KiB of them.
"""

from __future__ import annotations

import ctypes

_KEPT_BYTES = 128 << 20  # at the heap's top; above what sampling takes at once
_MAPPED_BYTES = 32 << 20  # larger blocks are mapped, and given back at once; the most that glibc takes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Set it for this process, before it makes threads; False where the C library has no such settings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One heap: those of other threads are cut into pieces of 64 MB, which are given back when they are empty.
    wanted = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _MAPPED_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return not [name for name, value in wanted if mallopt(name, value) != 1]  # every one is tried

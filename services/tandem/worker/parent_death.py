"""Ties a process to its parent, so that nothing of a worker outlives it, however it dies."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send `number` to this process when `parent`, its parent process, is gone.

    Call it first thing. Raises SystemExit if the parent is gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit(1)

"""Where the time of the C++ operators goes: their phases, added up by kind."""

from __future__ import annotations

import ctypes
from typing import Protocol

from tandem.engine.native.library import PROFILE_KINDS
from tandem.engine.ops.contract import KindTime


class Runtime(Protocol):
    """What is needed of `cpu.CpuRuntime`."""

    library: ctypes.CDLL
    handle: int


class CpuProfiler:
    """See `contract.Profiler`. A phase ends with its last task, whichever thread did it; timing reads the clock
    at the ends of phases."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def start(self) -> None:
        self.take()
        self._runtime.library.tandem_set_profiling(self._runtime.handle, 1)

    def take(self) -> tuple[KindTime, ...]:
        values = (ctypes.c_double * (2 * len(PROFILE_KINDS)))()
        status = self._runtime.library.tandem_take_profile(self._runtime.handle, len(PROFILE_KINDS), values)
        assert status == 0, "the library knows other kinds of phases"
        return tuple(
            KindTime(kind, values[2 * number], values[2 * number + 1]) for number, kind in enumerate(PROFILE_KINDS)
        )

    def stop(self) -> None:
        self._runtime.library.tandem_set_profiling(self._runtime.handle, 0)

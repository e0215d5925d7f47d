"""Compiles the operators library with plain g++: one object for each instruction set, each with its own flags.

Used by setup.py and by the tests. Standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
_X86 = ("x86_64", "AMD64")
# Contraction would let the compiler choose where a product and a sum are rounded together.
_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wshadow",
)
# GCC 12's own AVX-512 header reads variables that it leaves unset on purpose; the same kernels are compiled for AVX2
# with these warnings on.
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_FLAGS = {
    "isa_avx2.cpp": ("-mavx2", "-mfma"),
    "isa_avx512.cpp": _AVX512,
    "isa_avx512bf16.cpp": (*_AVX512, "-mavx512bf16"),
    "isa_amx.cpp": (*_AVX512, "-mavx512bf16"),
    "experts.cpp": (),
    "interface.cpp": (),
    "layers.cpp": (),
    "measures.cpp": (),
    "plan.cpp": (),
    "pool.cpp": (),
    "processor.cpp": (),
    "programs.cpp": (),
    "runtime.cpp": (),
}
# AMX's linears with its instructions in plain code: tests prove the kernels where no CPU has them.
_EMULATED = "-DTANDEM_EMULATED_TILES"
_EMULATED_FLAGS = {**_FLAGS, "processor.cpp": (_EMULATED,), "isa_amx_emulated.cpp": ("-mavx2", "-mfma", _EMULATED)}


class BuildFailed(Exception):
    """The library could not be built; the message says why."""


def build(
    library: Path,
    objects: Path,
    *,
    warnings_are_errors: bool = False,
    sanitizers: Sequence[str] = (),
    emulated_tiles: bool = False,
) -> None:
    """Compile and link `library`, with objects in a folder of their own; raises BuildFailed.

    `emulated_tiles` adds the kernels `amx-emulated`, for tests.
    """
    if platform.machine() not in _X86:
        raise BuildFailed(f"there are no kernels for {platform.machine()} processors")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildFailed("no C++ compiler was found (g++, c++, or the one that CXX names)")
    command = [*compiler.split(), *_COMMON]
    # At -O1 the checks make the kernels' functions so large that compiling them takes three times as long.
    command += ["-Og", "-g1", "-fno-omit-frame-pointer"] if sanitizers else ["-O3"]
    command += [f"-fsanitize={','.join(sanitizers)}", "-fno-sanitize-recover=all"] if sanitizers else []
    command += ["-Werror"] if warnings_are_errors else []
    flags = _EMULATED_FLAGS if emulated_tiles else _FLAGS
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(name: str) -> str:
        target = str(objects / f"{name}.o")
        _run([*command, *flags[name], "-c", str(SOURCES / name), "-o", target])
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        compiled = list(threads.map(compile_one, flags))
    # Written beside the old one and renamed: a process that has the old one mapped keeps it.
    unfinished = library.with_name(library.name + ".new")
    _run([*command, "-shared", "-o", str(unfinished), *compiled])
    unfinished.replace(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildFailed(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command)}\n{done.stderr[-4000:]}")

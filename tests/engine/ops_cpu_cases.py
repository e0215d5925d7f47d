"""The C++ operators as tests see them: built from these sources with warnings as errors, and plans made at random."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.engine.native.library import load_library
from tandem.engine.ops.contract import AttentionShape, TokenBatch
from tandem.engine.ops.cpu import KERNELS, CpuOperators

ROOT = Path(__file__).resolve().parents[2]
UNIT = 2.0**-24  # relative error of one float32 rounding
BF16_UNIT = 2.0**-8
EMULATED = "amx-emulated"  # AMX's linears with tile instructions in plain code
TESTED_KERNELS = (*KERNELS, EMULATED)
ROUNDING_KERNELS = ("amx", "avx512bf16", EMULATED)  # linears over bf16 weights round their inputs to bf16
PAIRED_KERNELS = ("amx", "avx512bf16")  # attention over a bf16 pool multiplies pairs of bf16
LIBRARY_VARIABLE = "OPERATORS_LIBRARY_UNDER_TEST"


def build_module() -> object:
    """native/build.py, which is no part of the package."""
    sys.path.insert(0, str(ROOT / "native"))
    try:
        import build
    finally:
        sys.path.pop(0)
    return build


def built_library(name: str, *, sanitizers: Sequence[str] = ()) -> Path:
    """Build the library, or take what an earlier run built from the same sources; skips without a compiler."""
    module = build_module()
    if platform.machine() != "x86_64":
        pytest.skip("kernels exist for x86-64 only")
    digest = hashlib.sha256()
    for source in sorted((ROOT / "native").glob("*.*")):
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "tests" / f"{name}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libtandem_operators.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            try:
                module.build(  # type: ignore[attr-defined]
                    library, folder / "objects", warnings_are_errors=True, sanitizers=sanitizers, emulated_tiles=True
                )
            except module.BuildFailed as failure:  # type: ignore[attr-defined]
                if "no C++ compiler" in str(failure):
                    pytest.skip(str(failure))
                raise
    return library


@cache
def library() -> ctypes.CDLL:
    given = os.environ.get(LIBRARY_VARIABLE)
    return load_library(Path(given) if given else built_library("plain"))


def operators(kernels: str, num_threads: int = 1) -> CpuOperators:
    """Operators with these kernels; skips if this CPU does not run them."""
    if not library().tandem_supports(kernels.encode()):
        pytest.skip(f"this CPU does not run {kernels}")
    return CpuOperators(kernels, num_threads, library())


every_kernel = pytest.mark.parametrize("kernels", TESTED_KERNELS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plan(
    rows: Sequence[tuple[int, int]], page_tokens: int, pages: Sequence[Sequence[int]] | None = None, seed: int = 0
) -> TokenBatch:
    """A plan of rows (start, number of tokens), on shuffled pages unless they are given."""
    starts = np.array([start for start, _ in rows], dtype=np.int64)
    lengths = np.array([length for _, length in rows], dtype=np.int64)
    counts = -(-(starts + lengths) // page_tokens)
    if pages is None:
        numbers = list(range(int(counts.sum()) + 3))
        random.Random(seed).shuffle(numbers)
        pages = [[numbers.pop() for _ in range(count)] for count in counts]
    table = np.zeros((len(rows), int(counts.max())), dtype=np.int64)
    for row, count in enumerate(counts):
        table[row, :count] = pages[row][:count]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(offsets[-1]) + (starts - offsets[:-1])[row_of_token]
    slots = table[row_of_token, positions // page_tokens] * page_tokens + positions % page_tokens
    return TokenBatch(
        page_tokens=page_tokens, offsets=offsets, starts=starts, positions=positions, slots=slots, page_table=table
    )


def attention_shape(kv_heads: int, group: int, head_dim: int, windows: tuple[int | None, ...]) -> AttentionShape:
    return AttentionShape(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        windows=windows,
        frequencies=1.0 / (1e4 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)),
        attention_factor=1.1,
    )

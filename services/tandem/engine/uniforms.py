"""Random numbers that are a function of (seed, index) and nothing else: no state, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: successive indices lie far apart before mixing


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each pair, float64 with 53 random bits. Seeds may be any integers; 64 bits count."""
    with np.errstate(over="ignore"):
        seed = np.array([value & _MASK for value in seeds], dtype=np.uint64)
        index = np.array([value & _MASK for value in indices], dtype=np.uint64)
        bits = _mix(_mix(seed + _STEP) + (index + np.uint64(1)) * _STEP)
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit integers in which every input bit changes every output bit with probability one half."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""The counter-based random numbers: fixed values, uniform, unrelated to their neighbours."""

from __future__ import annotations

import numpy as np

from tandem.engine.uniforms import uniforms


def _mixed(value: int) -> int:
    """splitmix64's output function, in Python's own integers."""
    mask = (1 << 64) - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)


def test_exact_values() -> None:
    """The numbers are part of what a seed means: they may not change between versions or machines."""
    step, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    for seed, index in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 2**31), (-1, 5), (2**70 + 3, 12)):
        bits = _mixed((_mixed(((seed & mask) + step) & mask) + (index + 1) * step) & mask)
        assert uniforms([seed], [index])[0] == (bits >> 11) * 2.0**-53
    assert uniforms([42, 42], [0, 1]).tolist() == [0.34329192209867343, 0.9557467261317436]


def test_uniform_over_seeds_and_over_indices() -> None:
    count, bins = 20_000, 50
    for numbers in (
        uniforms(range(count), [0] * count),
        uniforms([7] * count, range(count)),
        uniforms([s << 32 for s in range(count)], [9] * count),
    ):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        observed = np.histogram(numbers, bins=bins, range=(0, 1))[0]
        chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum()
        assert chi_square < 95  # 49 degrees of freedom: exceeded once in ten thousand
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03

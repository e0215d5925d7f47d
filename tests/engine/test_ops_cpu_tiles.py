"""AMX: the order in which its tiles add, who may have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.ops_cpu_cases import EMULATED, generator, library, operators

TILE_KERNELS = pytest.mark.parametrize("kernels", ["amx", EMULATED])


def tile_products(inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """TDPBF16PS as the architecture's manual has it, over depth [rows, 32 n] x [outputs, 32 n].

    Of each 32 products the even and the odd ones are added up apart, in order and rounded to float32 each time; then
    both sums, then that to what was there. Numbers must be such that double precision adds them exactly.
    """
    total = np.zeros((len(inputs), len(weights)), dtype=np.float32)
    for start in range(0, inputs.shape[1], 32):
        sums = np.zeros((2, *total.shape), dtype=np.float32)
        for k in range(start, start + 32):
            product = inputs[:, None, k].astype(np.float64) * weights[None, :, k]
            sums[k % 2] = (sums[k % 2].astype(np.float64) + product).astype(np.float32)
        total += sums[0] + sums[1]
    return total


@TILE_KERNELS
@pytest.mark.parametrize("depth", [31, 32, 700, 1100])
def test_tiles_add_in_the_documented_order(kernels: str, depth: int) -> None:
    random = generator(depth)
    inputs, weights = (
        torch.randint(-255, 256, (count, depth), generator=random)
        * 2.0 ** torch.randint(0, 8, (count, depth), generator=random)
        for count in (37, 50)
    )
    result = operators(kernels, 2).linear((weights.bfloat16(),), (None,))(inputs)
    padding = (0, -depth % 32)
    expected = tile_products(*(torch.nn.functional.pad(part, padding).numpy() for part in (inputs, weights)))
    assert torch.equal(result, torch.from_numpy(expected))
    if depth > 32:
        assert not torch.equal(result, inputs @ weights.t())  # rounding shows: the order is what is compared


@TILE_KERNELS
def test_inputs_are_rounded_to_nearest_even(kernels: str) -> None:
    """Ties, numbers that are no numbers, infinities, denormal numbers: each alone in its row."""
    values = torch.tensor([1.00390625, 1.01171875, 1.00390626, -1.00390625, 3e38, 1e-39, float("inf"), float("nan")])
    inputs = torch.zeros(len(values), 64)
    inputs[:, 40] = values
    weights = torch.zeros(1, 64)
    weights[0, 40] = 1.0
    result = operators(kernels).linear((weights.bfloat16(),), (None,))(inputs)[:, 0]
    expected = values.bfloat16().float()
    expected[5] = 0.0
    assert torch.equal(result[:6], expected[:6])
    assert not result[6:].isfinite().any()


def test_the_cpu_is_asked() -> None:
    """AMX runs where the CPU has it; this process may be refused it by the system, never be given it without."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if library().tandem_supports(b"amx"):
        assert {"amx_tile", "amx_bf16", "avx512_bf16"} <= set(flags)
    elif "amx_bf16" in flags:
        pytest.skip("the system does not give this process the tile registers")
    assert library().tandem_supports(b"avx2") == int("avx2" in flags and "fma" in flags)
    assert library().tandem_supports(b"nothing") == 0

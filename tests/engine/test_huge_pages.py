"""Large buffers of the operators ask for huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tandem.engine.native.memory import NativePages
from tests.engine.ops_cpu_cases import library, operators
from tests.mappings import mapping_at

HUGE = 2 << 20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> set[str]:
    """VmFlags of the mapping that holds an address."""
    return set(mapping_at(address).get("VmFlags:", "").split())


def test_advice_is_given() -> None:
    if not ENABLED.is_file():
        pytest.skip("this kernel has no transparent huge pages")
    pages = NativePages(library(), 3 * HUGE + 5)
    assert pages.address % HUGE == 0
    for address in (pages.address, pages.address + 3 * HUGE):
        assert "hg" in flags_at(address)
    small = NativePages(library(), HUGE // 2)
    assert "hg" not in flags_at(small.address), "the test's own eyes"


def test_packed_weights_lie_in_such_buffers() -> None:
    if not ENABLED.is_file():
        pytest.skip("this kernel has no transparent huge pages")
    linear = operators("avx2").linear((torch.zeros(2048, 1024, dtype=torch.bfloat16),), (None,))
    assert "hg" in flags_at(int(linear.fields.packed or 0))

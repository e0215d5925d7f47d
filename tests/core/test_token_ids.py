"""Token ids travel as little-endian uint32."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.token_ids import BYTES_PER_TOKEN, pack, unpack

IDS = st.lists(st.integers(0, 2**32 - 1))


@given(IDS)
def test_round_trip(ids: list[int]) -> None:
    assert unpack(pack(ids)) == ids
    assert pack(ids) == b"".join(value.to_bytes(BYTES_PER_TOKEN, "little") for value in ids)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_ids_outside_of_32_bits_are_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        pack([value])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_cut_token_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack(b"x" * length)

"""The fixed order of the largest values."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.ordering import top_values

rows = st.lists(
    st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0, float("-inf")]), min_size=9, max_size=9), min_size=1
)


@given(rows, st.integers(1, 12))
def test_certain_entries_begin_the_full_order(values: list[list[float]], count: int) -> None:
    tensor = torch.tensor(values)
    top, indices, certain = top_values(tensor, count)
    for row, row_values in enumerate(values):
        order = sorted(range(9), key=lambda index: (-row_values[index], index))
        sure = int(certain[row])
        assert indices[row, :sure].tolist() == order[:sure]
        assert top[row].tolist() == [row_values[index] for index in order[:count]]
        assert count < 9 or sure == 9
        assert sure < count or count >= 9

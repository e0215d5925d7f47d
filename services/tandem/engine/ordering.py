"""The largest values of each row in one fixed order: falling values, equal ones by rising index."""

from __future__ import annotations

import torch


def top_values(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return up to `count` largest values of each row in order, their indices, and how many of them are certain.

    [R, V] -> [R, k], [R, k], [R]. Which of several values equal to the last one are among the k is left to chance;
    only the first `certain` entries are what a full ordering begins with. No row may hold NaN.
    """
    num_values = values.shape[-1]
    if count >= num_values:
        ordered = torch.sort(values, dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices, ordered.indices.new_full((values.shape[0],), num_values)
    indices = torch.topk(values, count, dim=-1, sorted=False).indices.sort(dim=-1).values
    ordered = torch.sort(values.gather(-1, indices), dim=-1, descending=True, stable=True)
    certain = (ordered.values > ordered.values[:, -1:]).sum(dim=-1)
    return ordered.values, indices.gather(-1, ordered.indices), certain

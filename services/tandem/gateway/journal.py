"""What the client of one sequence has been given: each output index exactly once and in order, whoever sends it.

A resumed request is submitted with `token_ids` as its output.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.errors import TandemError


class Journal:
    """The output tokens of one sequence so far."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []

    def __len__(self) -> int:
        return len(self._token_ids)

    def accept(self, first_index: int, new: Sequence[int]) -> int:
        """Add output from index `first_index` on; return how many of `new` were known already.

        Raises TandemError for a gap, and for a token that differs from the one the client has.
        """
        known = len(self._token_ids) - first_index
        if known == 0:
            self._token_ids.extend(new)
            return 0
        if known < 0:
            raise TandemError(f"the worker left out {-known} tokens before index {first_index}")
        if list(new[:known]) != self._token_ids[first_index : first_index + len(new)]:
            raise TandemError(f"the worker changed tokens after index {first_index}")
        self._token_ids.extend(new[known:])
        return min(known, len(new))

    def cut(self, num_tokens: int) -> None:
        """Forget what came after the first `num_tokens`: a stop string ended the sequence there."""
        del self._token_ids[num_tokens:]

    @property
    def token_ids(self) -> Sequence[int]:
        """The output itself, not a copy."""
        return self._token_ids

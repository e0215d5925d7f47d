"""The frontend's memory of the blocks that a replica was sent."""

from __future__ import annotations

import pytest

from tandem.core import prefix_index
from tandem.core.prefix_index import PrefixIndex, hash_blocks
from tandem.core.token_ids import pack

PAGE = 4


def blocks(*token_ids: int, salt: str = "") -> tuple[int, ...]:
    return hash_blocks(pack(token_ids), salt, PAGE)


def test_the_last_token_is_in_no_block() -> None:
    """It is computed anew in any case, and with it the page that it ends."""
    assert [len(blocks(*range(length))) for length in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_a_block_is_its_whole_beginning() -> None:
    first = blocks(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert blocks(1, 2, 3, 4, 5, 6, 7, 8, 0) == first, "the last token does not count"
    assert blocks(1, 2, 3, 4, 5, 6, 7, 0, 9)[0] == first[0]
    assert blocks(1, 2, 3, 4, 5, 6, 7, 0, 9)[1] != first[1]
    assert blocks(0, 2, 3, 4, 5, 6, 7, 8, 9)[1] != first[1], "equal pages after different beginnings differ"
    assert blocks(1, 2, 3, 4, 5, salt="a")[0] != first[0]


def test_matches_are_leading_blocks() -> None:
    index = PrefixIndex(100)
    index.add(blocks(*range(20)))
    assert index.match(blocks(*range(20))) == 4
    assert index.match(blocks(*range(8), *range(12))) == 2
    assert index.match(blocks(9, *range(19))) == 0
    assert index.match(()) == 0


def test_the_bound_forgets_tails_first_and_what_was_used_longest_ago() -> None:
    index = PrefixIndex(6)
    long, other = blocks(*range(17)), blocks(*range(100, 117))
    index.add(long)
    index.add(other)
    assert len(index) == 6
    assert index.match(other) == 4
    assert index.match(long) == 2
    index.add(long[:2])
    index.add(blocks(*range(200, 217)))
    assert (index.match(long), index.match(other)) == (2, 0)


def test_a_prompt_beyond_the_bound_is_remembered_by_its_beginning() -> None:
    index = PrefixIndex(3)
    index.add(blocks(*range(40)))
    assert (len(index), index.match(blocks(*range(40)))) == (3, 3)


def test_a_large_pool_is_remembered_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "MAX_BLOCKS", 2)
    index = PrefixIndex(1 << 40)
    index.add(blocks(*range(40)))
    assert len(index) == 2

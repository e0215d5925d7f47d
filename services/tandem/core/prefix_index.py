"""What a replica's prefix cache may hold, as the frontend remembers it: hashes of the blocks that it sent there.

A guess, good enough to choose by: the replica's own tree decides what is reused. Bounded by the replica's pages
and by MAX_BLOCKS.
"""

from __future__ import annotations

from collections import OrderedDict

from tandem.core.token_ids import BYTES_PER_TOKEN

MAX_BLOCKS = 1 << 17  # of one replica, some 15 MB
Blocks = tuple[int, ...]  # chained hashes of a prompt's whole pages, from its beginning


def hash_blocks(prompt_token_ids: bytes, salt: str, page_tokens: int) -> Blocks:
    """Return the blocks of a packed prompt; its last token is in none, since it is always computed."""
    size = page_tokens * BYTES_PER_TOKEN
    chained = hash(salt)
    blocks = []
    for start in range(0, len(prompt_token_ids) - BYTES_PER_TOKEN - size + 1, size):
        chained = hash((chained, prompt_token_ids[start : start + size]))
        blocks.append(chained)
    return tuple(blocks)


class PrefixIndex:
    """The blocks that one replica was sent last, least recently used first."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = min(max_blocks, MAX_BLOCKS)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, blocks: Blocks) -> int:
        """Return how many leading blocks are known. Changes nothing."""
        for count, block in enumerate(blocks):
            if block not in self._blocks:
                return count
        return len(blocks)

    def add(self, blocks: Blocks) -> None:
        """Remember these as used now; the tail of a prompt is forgotten before its beginning."""
        for block in reversed(blocks[: self._max_blocks]):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

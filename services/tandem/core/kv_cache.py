"""Pages for requests: the pool and the prefix tree as one thing."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.core.pages import PagePool
from tandem.core.radix import PrefixTree
from tandem.core.request import Request


class KvCache:
    """Allocates, shares and returns pages. Decides nothing about who must give way."""

    def __init__(self, num_pages: int, page_tokens: int, prefix_cache: bool) -> None:
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(self.pool, page_tokens)
        self.page_tokens = page_tokens
        self._enabled = prefix_cache

    def allocate(self, count: int, spare: int = 0) -> list[int] | None:
        """Take `count` pages, evicting cached ones as needed; None (and nothing taken) if they are not to be had.

        With `spare`, so many pages must be free beside them.
        """
        missing = count + spare - self.pool.num_free
        if missing > self.pool.num_cached:
            return None  # nothing is evicted in vain
        if missing > 0:
            self.tree.evict(missing)
        if count + spare > self.pool.num_free:
            return None
        return self.pool.allocate(count)

    def shortage(self, count: int, spare: int = 0) -> int:
        """Return how many of these pages lack even when every launch in flight will have resolved.

        0 after a failed `allocate`: the pages come back by themselves, and somebody else's need not be taken.
        """
        pool = self.pool
        return max(0, count + spare - pool.num_free - pool.num_cached - pool.num_fenced)

    def attach_prefix(self, request: Request, max_tokens: int) -> int:
        """Give a request without pages its longest cached prefix of at most `max_tokens`; return the tokens in it."""
        assert not request.pages
        if not self._enabled or request.wants_prompt_logprobs:
            return 0
        path = self.tree.match(request.tokens, request.prefix_root, max_tokens)
        if not path:
            return 0
        pages = [node.page for node in path]
        self.pool.acquire(pages)
        request.set_pages(pages)
        request.path_end = path[-1]
        request.num_in_tree = len(pages)
        return len(pages) * self.page_tokens

    def detach_prefix(self, request: Request) -> None:
        """Undo `attach_prefix` of a request that could not start: its prefix was not used, so it gets no new date."""
        pages, request.path_end = request.pages, None
        request.set_pages([])
        request.num_in_tree = 0
        self.tree.untouched(self.pool.release(pages))

    def publish(self, request: Request) -> None:
        """Put the request's newly computed full pages into the tree, as far as its own path reaches.

        Where the same tokens are in the tree already, in a page of somebody else, the rest of this request stays
        private: a child must never outlive its parent.
        """
        if not self._enabled:
            return
        size = self.page_tokens
        while request.tree_open and (request.num_in_tree + 1) * size <= request.num_computed:
            index = request.num_in_tree
            key = tuple(request.tokens[index * size : (index + 1) * size])
            node = self.tree.insert(request.path_end, request.prefix_root, key, request.pages[index])
            if node is None:
                request.tree_open = False
                return
            request.path_end = node
            request.num_in_tree += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page; `pages` in order of position."""
        self.tree.released(self.pool.release(pages))

    def release_request(self, request: Request) -> None:
        """Drop the request's pages."""
        pages, request.path_end = request.pages, None
        request.set_pages([])
        request.num_in_tree = 0
        self.release(pages)

"""The prefix tree: which tokens the cached pages hold.

A radix tree whose edges are whole pages: a node is one page and the tokens in it; its path from the root is the prefix
that the page continues. Only full pages enter. Nodes without references are evicted from the leaves, least recently
used first. A request that holds a node holds its whole path, so an unreferenced node never has a referenced child.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence

from tandem.core.pages import PagePool

_ROOT = -1
_STALE_LEAVES_MAX = 64


class Node:
    """One cached page. `parent` is None for the root of a salt, whose `page` is -1, and below an orphan."""

    __slots__ = ("children", "fence", "key", "page", "parent", "salt", "used")

    def __init__(self, page: int, key: tuple[int, ...], parent: Node | None, salt: Hashable) -> None:
        self.page = page
        self.salt = salt
        self.key = key
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.used = 0  # tick of the last release; the LRU order
        self.fence = 0  # last plan launched before that release


class PrefixTree:
    """Prefixes by cache salt and adapter (`salt` stands for both). Shares the pool's view of who holds what."""

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self._pool = pool
        self._page_tokens = page_tokens
        self._roots: dict[Hashable, Node] = {}
        self._nodes: dict[int, Node] = {}  # by page
        self._leaves: list[tuple[int, int]] = []  # heap of (used, page); stale entries are skipped
        self._tick = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, token_ids: Sequence[int], salt: Hashable, max_tokens: int) -> list[Node]:
        """Return the nodes of the longest cached prefix of at most `max_tokens` tokens. Changes nothing."""
        node = self._roots.get(salt)
        path: list[Node] = []
        size = self._page_tokens
        for start in range(0, max_tokens - size + 1, size):
            if node is None:
                break
            node = node.children.get(tuple(token_ids[start : start + size]))
            if node is not None:
                path.append(node)
        return path

    def insert(self, parent: Node | None, salt: Hashable, key: tuple[int, ...], page: int) -> Node | None:
        """Add a held page below `parent` (None: the root of `salt`; prefixes of different salts never meet).

        Returns None if these tokens are there already, in another page.
        """
        assert len(key) == self._page_tokens
        if parent is None:
            parent = self._roots.setdefault(salt, Node(_ROOT, (), None, salt))
        if key in parent.children:
            return None
        node = Node(page, key, parent, salt)
        parent.children[key] = node
        self._nodes[page] = node
        self._pool.enter_tree(page)
        return node

    def released(self, pages: Sequence[int]) -> None:
        """Date pages that have just lost their last reference, in prefix order: the tail of a path is evicted first."""
        for page in reversed(pages):
            node = self._nodes[page]
            self._tick += 1
            node.used = self._tick
            node.fence = self._pool.launched
            if not node.children:
                self._push(node)

    def untouched(self, pages: Sequence[int]) -> None:
        """Take pages back that have just lost their last reference without having been used: they keep their date."""
        for page in pages:
            if not self._nodes[page].children:
                self._push(self._nodes[page])

    def evict(self, count: int) -> int:
        """Free up to `count` unreferenced leaves, least recently used first; return how many were freed."""
        freed = 0
        while freed < count and self._leaves:
            used, page = self._leaves[0]
            node = self._nodes.get(page)
            if node is None or node.used != used or node.children or self._pool.references(page):
                heapq.heappop(self._leaves)  # stale
                continue
            if node.fence > self._pool.resolved:
                break  # fences ascend with `used`: nothing behind it is evictable either
            heapq.heappop(self._leaves)
            self._remove(node)
            freed += 1
        return freed

    def clear(self) -> int:
        """Evict everything that may be evicted now; return how many pages that were."""
        return self.evict(len(self._nodes))

    def pages(self) -> list[int]:
        return list(self._nodes)

    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def forget(self, page: int) -> None:
        """Take an orphan's node out, with everything below it, without touching the pool's counts."""
        node = self._nodes.pop(page, None)
        if node is None:
            return
        for child in node.children.values():
            child.parent = None  # found no more, but evicted like any other
        node.children.clear()
        self._cut(node)

    def _remove(self, node: Node) -> None:
        del self._nodes[node.page]
        self._pool.leave_tree(node.page)
        self._cut(node)

    def _cut(self, node: Node) -> None:
        """Take a node from its parent, which may be evicted next if that was its last child."""
        parent, node.parent = node.parent, None
        if parent is None:
            return
        del parent.children[node.key]
        if parent.children:
            return
        if parent.page == _ROOT:
            del self._roots[parent.salt]
        elif not self._pool.references(parent.page):
            self._push(parent)

    def _push(self, node: Node) -> None:
        heapq.heappush(self._leaves, (node.used, node.page))
        if len(self._leaves) > 2 * len(self._nodes) + _STALE_LEAVES_MAX:
            leaves = (node for node in self._nodes.values() if not node.children)
            self._leaves = [(node.used, node.page) for node in leaves if not self._pool.references(node.page)]
            heapq.heapify(self._leaves)

"""PrefixTree: what is found, what is evicted first, and what never is."""

from __future__ import annotations

from tandem.core.pages import PagePool
from tandem.core.radix import Node, PrefixTree

SIZE = 2


class Forest:
    """A tree over a pool, with whole paths put in and released."""

    def __init__(self, num_pages: int = 16) -> None:
        self.pool = PagePool(num_pages)
        self.tree = PrefixTree(self.pool, SIZE)

    def put(self, tokens: str, salt: str = "") -> list[int]:
        """Hold a path of pages for `tokens`, sharing what is there."""
        path = self.tree.match([ord(token) for token in tokens], salt, len(tokens))
        self.pool.acquire([node.page for node in path])
        parent: Node | None = path[-1] if path else None
        pages = [node.page for node in path]
        for start in range(len(pages) * SIZE, len(tokens) - SIZE + 1, SIZE):
            fresh = self.pool.allocate(1)
            assert fresh is not None
            key = tuple(ord(token) for token in tokens[start : start + SIZE])
            parent = self.tree.insert(parent, salt, key, fresh[0])
            assert parent is not None
            pages += fresh
        return pages

    def drop(self, pages: list[int]) -> None:
        self.tree.released(self.pool.release(pages))

    def cached(self, *prefixes: str, salt: str = "") -> list[int]:
        """How many tokens of each are found."""
        return [SIZE * len(self.tree.match([ord(token) for token in prefix], salt, len(prefix))) for prefix in prefixes]


def test_match_is_by_whole_pages_and_bounded() -> None:
    forest = Forest()
    forest.put("abcdef")
    tokens = [ord(token) for token in "abcdef"]
    assert [len(forest.tree.match(tokens, "", bound)) for bound in range(7)] == [0, 0, 1, 1, 2, 2, 3]
    assert forest.cached("ab", "abcd", "abce", "xbcd", "a", "") == [2, 4, 2, 0, 0, 0]


def test_salts_never_meet() -> None:
    forest = Forest()
    forest.put("abcd", salt="alice")
    assert forest.cached("abcd", salt="bob") == [0]
    assert forest.cached("abcd") == [0]
    other = forest.put("abcd", salt="bob")
    assert forest.cached("abcd", salt="alice") == [4]
    assert len(set(other)) == 2
    assert len(forest.tree) == 4


def test_the_same_tokens_do_not_enter_twice() -> None:
    forest = Forest()
    forest.put("ab")
    fresh = forest.pool.allocate(1)
    assert fresh is not None
    assert forest.tree.insert(None, "", (ord("a"), ord("b")), fresh[0]) is None
    assert not forest.pool.in_tree(fresh[0])


def test_least_recently_used_leaves_go_first() -> None:
    forest = Forest()
    for tokens in ("abcd", "abef", "ghij"):
        forest.drop(forest.put(tokens))
    forest.drop(forest.put("abcd"))  # used again
    order = []
    while len(forest.tree):
        assert forest.tree.evict(1) == 1
        order.append(forest.cached("abcd", "abef", "ghij"))
    assert order == [[4, 2, 4], [4, 2, 2], [4, 2, 0], [2, 2, 0], [0, 0, 0]]
    assert forest.pool.num_free == 16


def test_a_held_path_stays_whole() -> None:
    forest = Forest()
    forest.drop(forest.put("abcdef"))
    held = forest.put("abcd")
    assert forest.tree.evict(10) == 1
    assert forest.cached("abcdef") == [4]
    assert forest.tree.evict(10) == 0
    forest.drop(held)
    assert forest.tree.evict(10) == 2


def test_nothing_is_evicted_before_the_launches_in_flight_have_resolved() -> None:
    forest = Forest()
    forest.drop(forest.put("ab"))
    pages = forest.put("cd")
    forest.pool.note_launch(1)
    forest.drop(pages)
    forest.pool.note_launch(2)
    assert forest.tree.evict(10) == 1, "what was released before the launch"
    assert forest.cached("ab", "cd") == [0, 2]
    forest.pool.note_resolved(1)
    assert forest.tree.evict(10) == 1


def test_clear_and_reuse_of_an_emptied_salt() -> None:
    forest = Forest()
    forest.drop(forest.put("abcd", salt="alice"))
    assert forest.tree.clear() == 2
    assert len(forest.tree) == 0
    forest.put("abcd", salt="alice")
    assert forest.cached("abcd", salt="alice") == [4]


def test_an_orphan_takes_only_its_own_branch_out_of_sight() -> None:
    """The pages below it are found no more, and go back one by one; the rest of the tree does not notice."""
    forest = Forest()
    branch = forest.put("abcdef")
    forest.drop(branch)
    forest.drop(forest.put("ghij"))
    forest.tree.forget(branch[1])
    forest.pool.orphan(branch[1])
    assert forest.cached("abcdef", "ghij") == [2, 4]
    forest.drop(forest.put("abxy"))
    assert forest.tree.evict(20) == 5
    assert len(forest.tree) == 0
    assert forest.pool.num_free == 15
    forest.put("ghij")
    assert forest.cached("ghij") == [4]


def test_an_orphan_of_the_first_page_leaves_its_salt_alone() -> None:
    forest = Forest()
    branch = forest.put("abcd")
    forest.drop(branch)
    held = forest.put("ghij")
    forest.tree.forget(branch[0])
    forest.pool.orphan(branch[0])
    assert forest.tree.evict(20) == 1
    assert forest.cached("abcd", "ghij") == [0, 4]
    forest.drop(held)
    assert forest.tree.evict(20) == 2


def test_the_order_of_use_is_remembered_in_bounded_space() -> None:
    forest = Forest()
    for _ in range(1000):
        forest.drop(forest.put("abcd"))
    assert len(forest.tree._leaves) < 200
    assert forest.tree.evict(10) == 2

"""PagePool against a naive model, and its assertions."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.core.pages import PagePool

NUM_PAGES = 7


class PoolMachine(RuleBasedStateMachine):
    """The model says of each page what is known of it, without counting anything incrementally."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.references: Counter[int] = Counter()
        self.tree: set[int] = set()
        self.busy: set[int] = set()
        self.fence: dict[int, int] = {}  # of pages without references: the last plan launched before that
        self.launched = self.resolved = 0

    def is_free(self, page: int) -> bool:
        return (
            not self.references[page]
            and page not in self.tree
            and page not in self.busy
            and self.fence.get(page, 0) <= self.resolved
        )

    def held(self) -> list[int]:
        return [page for page in range(NUM_PAGES) if self.references[page]]

    def pick(self, data: st.DataObject, pages: list[int]) -> int:
        return data.draw(st.sampled_from(pages))

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        free = [page for page in range(NUM_PAGES) if self.is_free(page)]
        pages = self.pool.allocate(count)
        if count > len(free):
            assert pages is None
            return
        assert pages is not None
        assert len(set(pages)) == count
        assert set(pages) <= set(free)
        self.references.update(pages)

    @precondition(lambda self: self.held() or self.tree)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        page = self.pick(data, sorted({*self.held(), *self.tree}))
        self.pool.acquire([page])
        self.references[page] += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = self.pick(data, self.held())
        cached = self.pool.release([page])
        self.references[page] -= 1
        if not self.references[page]:
            self.fence[page] = self.launched
        assert cached == ([page] if page in self.tree and not self.references[page] else [])

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def enter_tree(self, data: st.DataObject) -> None:
        page = self.pick(data, self.held())
        if page in self.tree or page in self.busy:
            with pytest.raises(AssertionError):
                self.pool.enter_tree(page)
            return
        self.pool.enter_tree(page)
        self.tree.add(page)

    @rule(data=st.data())
    def leave_tree(self, data: st.DataObject) -> None:
        """The tree evicts only pages whose fence has resolved."""
        pages = [p for p in self.tree if not self.references[p] and self.fence[p] <= self.resolved]
        if pages:
            page = self.pick(data, sorted(pages))
            self.pool.leave_tree(page)
            self.tree.remove(page)

    @precondition(lambda self: set(self.held()) - self.tree - self.busy)
    @rule(data=st.data())
    def mark_busy(self, data: st.DataObject) -> None:
        page = self.pick(data, sorted(set(self.held()) - self.tree - self.busy))
        self.pool.mark_busy([page])
        self.busy.add(page)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def clear_busy(self, data: st.DataObject) -> None:
        page = self.pick(data, sorted(self.busy))
        self.pool.clear_busy([page])
        self.busy.remove(page)
        if not self.references[page]:
            self.fence[page] = self.launched  # careful: from the end of the transfer on

    @rule()
    def launch(self) -> None:
        self.launched += 1
        self.pool.note_launch(self.launched)

    @precondition(lambda self: self.resolved < self.launched)
    @rule()
    def resolve(self) -> None:
        self.resolved += 1
        self.pool.note_resolved(self.resolved)

    @invariant()
    def agrees(self) -> None:
        pool, pages = self.pool, range(NUM_PAGES)
        counts = pool.counts()
        free = {page for page in pages if self.is_free(page)}
        cached = {page for page in self.tree if not self.references[page]}
        assert set(pool.free_pages()) == free
        assert counts.free == pool.num_free == len(free)
        assert counts.held == len(self.held())
        assert counts.cached == len(cached)
        assert counts.quarantined == NUM_PAGES - len(free) - len(self.held()) - len(cached)
        assert all(pool.references(page) == self.references[page] for page in pages)
        assert all(pool.is_busy(page) == (page in self.busy) for page in pages)
        assert pool.quiet == (self.launched == self.resolved and not self.busy)
        waiting = {p for p in pages if not self.references[p] and p not in self.tree | self.busy | free}
        assert set(pool.fenced_pages()) == waiting


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_double_release_asserts_with_the_history() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(AssertionError, match=r"released twice.*allocated@0.*released@0"):
        pool.release(pages)


def test_a_free_page_cannot_be_acquired() -> None:
    with pytest.raises(AssertionError, match="neither held nor cached"):
        PagePool(2).acquire([0])


def test_plans_are_numbered_and_resolve_in_order() -> None:
    pool = PagePool(1)
    with pytest.raises(AssertionError, match="without gaps"):
        pool.note_launch(2)
    pool.note_launch(1)
    pool.note_launch(2)
    with pytest.raises(AssertionError, match="in order"):
        pool.note_resolved(2)


def test_an_orphan_never_comes_back() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    assert pages == [0, 1]
    pool.mark_busy([0])
    pool.orphan(0)
    pool.orphan(0)
    assert (pool.num_orphans, pool.counts().quarantined, pool.counts().held) == (1, 1, 1)
    pool.clear_busy([0])
    assert pool.allocate(1) is None
    pool.release([1])
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [1]


def test_an_orphan_of_the_tree_is_not_cached_any_more() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.enter_tree(0)
    pool.release(pages)
    pool.orphan(0)
    assert (pool.counts().cached, pool.counts().quarantined) == (0, 1)
    assert not pool.in_tree(0)

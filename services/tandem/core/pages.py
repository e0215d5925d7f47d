"""Who owns which page. Numbers only: no memory, no tokens.

A page is in exactly one state:

    free         on the free list
    held         references > 0 (requests and hand-offs)
    cached       no references, in the prefix tree: evictable once no launch can still read it
    quarantined  no references, not in the tree, but a launch or a transfer may still touch it, or it is an orphan

A *fence* is the id of the last plan launched before a release; the page is untouched by launches once that plan has
resolved. *busy* counts transfers that may still write into a page.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tandem.core.stats import PageCounts

_HISTORY = 6


class PageTables(NamedTuple):
    """The pool's own tables, by page, for whoever checks them all; not to be changed."""

    references: list[int]
    in_tree: bytearray
    busy: list[int]


class PagePool:
    """Reference counts and states of `num_pages` pages."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(num_pages))
        self._references = [0] * num_pages
        self._busy = [0] * num_pages
        self._in_tree = bytearray(num_pages)
        self._fenced: deque[tuple[int, int]] = deque()  # (fence, page), fences ascending
        self._num_held = 0
        self._num_cached = 0
        self._orphans: set[int] = set()
        self._history: list[deque[str]] = [deque(maxlen=_HISTORY) for _ in range(num_pages)]
        self.launched = 0  # id of the last launched plan
        self.resolved = 0  # id of the last resolved plan

    # ---- launches -------------------------------------------------------------------------------------------------

    def note_launch(self, plan_id: int) -> None:
        assert plan_id == self.launched + 1, "plans are numbered from 1 without gaps"
        self.launched = plan_id

    def note_resolved(self, plan_id: int) -> None:
        """Free what only waited for this plan."""
        assert plan_id == self.resolved + 1, "plans resolve in order"
        self.resolved = plan_id
        while self._fenced and self._fenced[0][0] <= plan_id:
            _, page = self._fenced.popleft()
            self._to_free(page)

    # ---- references -----------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def num_fenced(self) -> int:
        return len(self._fenced)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free pages with one reference each, or None (and nothing) if there are fewer."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            assert self._references[page] == 0 and not self._in_tree[page] and self._busy[page] == 0
            self._references[page] = 1
            self._note(page, "allocated")
        self._num_held += count
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """Add a reference to pages that are held or cached."""
        for page in pages:
            if self._references[page] == 0:
                assert self._in_tree[page], f"page {page} is neither held nor cached"
                self._num_cached -= 1
                self._num_held += 1
            self._references[page] += 1
            self._note(page, "acquired")

    def release(self, pages: Iterable[int]) -> list[int]:
        """Drop a reference each; return the pages that are cached now, for the tree to date."""
        cached: list[int] = []
        for page in pages:
            assert self._references[page] > 0, f"page {page} released twice: {self.history(page)}"
            self._references[page] -= 1
            self._note(page, "released")
            if self._references[page]:
                continue
            self._num_held -= 1
            if self._in_tree[page]:
                self._num_cached += 1
                cached.append(page)
            else:
                self._retire(page)
        return cached

    def references(self, page: int) -> int:
        return self._references[page]

    # ---- transfers ------------------------------------------------------------------------------------------------

    def mark_busy(self, pages: Iterable[int]) -> None:
        """A transfer may write into these held pages from now on."""
        for page in pages:
            assert self._references[page] > 0 and not self._in_tree[page] and self._busy[page] == 0, page
            self._busy[page] = 1
            self._note(page, "busy")

    def clear_busy(self, pages: Iterable[int]) -> None:
        """It is proven that the transfer is over."""
        for page in pages:
            assert self._busy[page] == 1, page
            self._busy[page] = 0
            self._note(page, "quiet")
            if self._references[page] == 0 and page not in self._orphans:
                self._retire(page)

    def is_busy(self, page: int) -> bool:
        return self._busy[page] > 0

    # ---- the tree's side ------------------------------------------------------------------------------------------

    def enter_tree(self, page: int) -> None:
        assert self._references[page] > 0 and not self._in_tree[page] and self._busy[page] == 0
        self._in_tree[page] = 1

    def leave_tree(self, page: int) -> None:
        """Evict: the page was cached and returns to the free list at once (its fence has resolved)."""
        assert self._in_tree[page] and self._references[page] == 0
        self._in_tree[page] = 0
        self._num_cached -= 1
        self._note(page, "evicted")
        self._to_free(page)

    def in_tree(self, page: int) -> bool:
        return bool(self._in_tree[page])

    # ---- checks ---------------------------------------------------------------------------------------------------

    def counts(self) -> PageCounts:
        free = len(self._free)
        return PageCounts(
            free=free,
            held=self._num_held,
            cached=self._num_cached,
            quarantined=self.num_pages - free - self._num_held - self._num_cached,
            total=self.num_pages,
        )

    def orphan(self, page: int) -> None:
        """Keep a page with a wrong reference count out of use until restart. Never back to the free list."""
        if page in self._orphans:
            return
        if self._references[page]:
            self._num_held -= 1
        elif self._in_tree[page]:
            self._num_cached -= 1
        self._references[page] = 0
        self._in_tree[page] = 0
        self._orphans.add(page)
        self._note(page, "orphaned")

    def restate(self, page: int, references: int) -> None:
        """Believe the owners of a page with a wrong reference count: it is held by so many, and by nobody else."""
        assert references > 0
        if self._references[page] == 0:
            if self._in_tree[page]:
                self._num_cached -= 1
            elif page in self._free:
                self._free.remove(page)
            else:
                self._fenced = deque(entry for entry in self._fenced if entry[1] != page)
            self._num_held += 1
        self._references[page] = references
        self._note(page, "restated")

    @property
    def num_orphans(self) -> int:
        return len(self._orphans)

    @property
    def quiet(self) -> bool:
        """Whether no launch and no transfer can touch any page."""
        return self.launched == self.resolved and not any(self._busy)

    def orphans(self) -> Sequence[int]:
        return tuple(self._orphans)

    def tables(self) -> PageTables:
        return PageTables(self._references, self._in_tree, self._busy)

    def free_pages(self) -> Sequence[int]:
        return tuple(self._free)

    def fenced_pages(self) -> Sequence[int]:
        return tuple(page for _, page in self._fenced)

    def history(self, page: int) -> tuple[str, ...]:
        """Return the last operations on a page, oldest first, each with the plan it followed."""
        return tuple(self._history[page])

    def _retire(self, page: int) -> None:
        if self._busy[page]:
            return  # clear_busy retires it
        if self.launched == self.resolved:
            self._to_free(page)
        else:
            self._fenced.append((self.launched, page))

    def _to_free(self, page: int) -> None:
        assert self._references[page] == 0 and not self._busy[page] and not self._in_tree[page]
        self._free.append(page)
        self._note(page, "freed")

    def _note(self, page: int, what: str) -> None:
        self._history[page].append(f"{what}@{self.launched}")

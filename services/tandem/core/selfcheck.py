"""The idle self-check: free + cached + held + quarantined == total, and every reference has a known owner."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from tandem.core.ledger import Ledger


class SelfCheck:
    """Finds pages whose reference count is not what their owners add up to, and takes them out of use.

    Orphans go to quarantine until restart, never back to the free list: who may still touch them is unknown. A page
    that has owners is theirs, as many as they are.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def run(self, handoff_pins: Iterable[int], pages_under_read: Iterable[int]) -> list[str]:
        """Return one line for each fault found, with the page's history; empty when all is well."""
        expected = self._numbers(handoff_pins)
        for request in self._ledger.requests.values():
            for page in request.pages:
                expected[page] += 1
        faults = self._correct(expected) if expected != self._ledger.kv.pool.tables().references else []
        return faults + self._place_faults(self._numbers(pages_under_read)) + self._count_faults()

    def _numbers(self, pages: Iterable[int]) -> list[int]:
        """Return how often each page occurs."""
        numbers = [0] * self._ledger.kv.pool.num_pages
        for page in pages:
            numbers[page] += 1
        return numbers

    def _correct(self, expected: list[int]) -> list[str]:
        kv = self._ledger.kv
        faults: list[str] = []
        for page, owners in enumerate(expected):
            references = kv.pool.references(page)
            if references == owners:
                continue
            faults.append(f"page {page}: {references} references, {owners} known owners: {self._history(page)}")
            if owners:
                kv.pool.restate(page, owners)
            else:
                kv.tree.forget(page)
                kv.pool.orphan(page)
        return faults

    def _place_faults(self, under_read: list[int]) -> list[str]:
        """Compare where each page is with where its state says that it must be."""
        kv = self._ledger.kv
        references, in_tree, busy = kv.pool.tables()
        found = self._numbers(kv.tree.pages())
        # A page that nothing holds is once on the free list, or once in the queue for it.
        places = self._numbers((*kv.pool.free_pages(), *kv.pool.fenced_pages()))
        unheld = [
            int(not (held or cached or read)) for held, cached, read in zip(references, in_tree, busy, strict=True)
        ]
        for page in kv.pool.orphans():
            unheld[page] = 0
        faults: list[str] = []
        for what, is_so, must_be in (
            ("under a read", busy, under_read),
            ("in the tree", list(in_tree), found),
            ("free, or soon", places, unheld),
        ):
            if is_so != must_be:
                faults += (
                    f"page {page}: {what} is {is_so[page]}, must be {must_be[page]}: {self._history(page)}"
                    for page in range(kv.pool.num_pages)
                    if is_so[page] != must_be[page]
                )
        return faults

    def _count_faults(self) -> list[str]:
        pool = self._ledger.kv.pool
        counts, (references, in_tree, _) = pool.counts(), pool.tables()
        faults: list[str] = []
        held = len(references) - references.count(0)
        if held != counts.held:
            faults.append(f"{held} pages are referenced, {counts.held} counted as held")
        cached = in_tree.count(1) - sum(map(bool, itertools.compress(references, in_tree)))
        if cached != counts.cached:
            faults.append(f"{cached} pages are cached, {counts.cached} counted")
        if counts.quarantined < 0:
            faults.append(f"pages do not add up: {counts}")
        return faults

    def _history(self, page: int) -> str:
        return ", ".join(self._ledger.kv.pool.history(page))

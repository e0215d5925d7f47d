"""The idle self-check: free + cached + held + quarantined == total, and every reference has a known owner."""

from __future__ import annotations

from collections import Counter
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
        kv = self._ledger.kv
        expected: Counter[int] = Counter(handoff_pins)
        for request in self._ledger.requests.values():
            expected.update(request.pages)
        faults: list[str] = []
        for page in range(kv.pool.num_pages):
            references = kv.pool.references(page)
            if references == expected[page]:
                continue
            history = ", ".join(kv.pool.history(page))
            faults.append(f"page {page}: {references} references, {expected[page]} known owners: {history}")
            if expected[page]:
                kv.pool.restate(page, expected[page])
            else:
                kv.tree.forget(page)
                kv.pool.orphan(page)
        return faults + self._place_faults(set(pages_under_read)) + self._count_faults()

    def _place_faults(self, under_read: set[int]) -> list[str]:
        """Compare where each page is with where its state says that it must be."""
        kv = self._ledger.kv
        pool, cached = kv.pool, {node.page for node in kv.tree.nodes()}
        free, fenced = Counter(pool.free_pages()), Counter(pool.fenced_pages())
        faults: list[str] = []
        for page in range(pool.num_pages):
            busy = pool.is_busy(page)
            if busy != (page in under_read):
                faults.append(f"page {page}: busy is {busy}, under a read is {page in under_read}")
            if pool.in_tree(page) != (page in cached):
                faults.append(f"page {page}: in the tree is {pool.in_tree(page)}, found there is {page in cached}")
            elsewhere = bool(pool.references(page)) or pool.in_tree(page) or busy or pool.is_orphan(page)
            if free[page] + fenced[page] != (not elsewhere):
                history = ", ".join(pool.history(page))
                faults.append(f"page {page}: {free[page]} times free, {fenced[page]} times fenced: {history}")
        return faults

    def _count_faults(self) -> list[str]:
        pool = self._ledger.kv.pool
        counts, pages = pool.counts(), range(pool.num_pages)
        faults: list[str] = []
        held = sum(pool.references(page) > 0 for page in pages)
        if held != counts.held:
            faults.append(f"{held} pages are referenced, {counts.held} counted as held")
        cached = sum(pool.in_tree(page) and not pool.references(page) for page in pages)
        if cached != counts.cached:
            faults.append(f"{cached} pages are cached, {counts.cached} counted")
        if counts.quarantined < 0:
            faults.append(f"pages do not add up: {counts}")
        return faults

"""The idle self-check: free + cached + held + quarantined == total, and every reference has a known owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tandem.core.ledger import Ledger


class SelfCheck:
    """Finds pages whose reference count is not what their owners add up to, and takes them out of use.

    Orphans go to quarantine until restart, never back to the free list: who may still touch them is unknown.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def run(self, handoff_pins: Iterable[int]) -> list[str]:
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
            if expected[page] == 0:
                kv.tree.forget(page)
                kv.pool.orphan(page)
        return faults + self._count_faults()

    def _count_faults(self) -> list[str]:
        pool = self._ledger.kv.pool
        counts = pool.counts()
        free, fenced = pool.free_pages(), pool.fenced_pages()
        faults: list[str] = []
        if counts.free + counts.held + counts.cached + counts.quarantined != counts.total or counts.quarantined < 0:
            faults.append(f"pages do not add up: {counts}")
        if len(set(free)) != len(free) or set(free) & set(fenced):
            faults.append("a page is on the free list twice")
        wrong = [page for page in free if pool.references(page) or pool.in_tree(page) or pool.is_busy(page)]
        if wrong:
            faults.append(f"free pages are in use: {wrong}")
        held = sum(pool.references(page) > 0 for page in range(pool.num_pages))
        if held != counts.held:
            faults.append(f"{held} pages are referenced, {counts.held} counted as held")
        return faults

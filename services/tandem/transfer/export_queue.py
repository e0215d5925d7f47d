"""Hashes announced pages in order, off every other thread's way, and hands them to the exporters."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from tandem.core.messages.transfer import Exported, RankExport, Revoke, Revoked, Slab
from tandem.transfer import hashing
from tandem.transfer.contract import Exporter, Post
from tandem.transfer.pages import Pages, PageSpace, check_slab

_HASH_BYTES = 16 << 20  # hashed at a stretch: how soon a revocation is noticed


class ExportQueue:
    """One thread. Bounded by the pool: every page that waits is pinned by the rank until Revoked."""

    def __init__(self, space: PageSpace, exporters: Sequence[Exporter], post: Post) -> None:
        self._space = space
        self._exporters = exporters
        self._post = post
        self._changed = threading.Condition()
        self._queue: deque[RankExport] = deque()
        self._current: RankExport | None = None
        self._waiting: list[Callable[[], None]] = []  # for the end of the current export, which is revoked
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-hash", daemon=True)
        self._thread.start()

    def export(self, export: RankExport) -> None:
        """Stop serving lower attempts now; serve this one once its pages are hashed."""
        for piece in export.pieces:
            check_slab(piece, self._space.page_bytes)
        for exporter in self._exporters:
            exporter.open(export.handoff_id, export.attempt, export.token, self._pieces(export))
        with self._changed:
            self._queue.append(export)
            self._changed.notify()

    def revoke(self, revoke: Revoke) -> None:
        """Stop serving now; post Revoked once neither an exporter nor the hash reads the pages."""
        done = _Countdown(len(self._exporters) + 1, lambda: self._post(Revoked(revoke.handoff_id)))
        for exporter in self._exporters:
            exporter.revoke(revoke.handoff_id, done)
        with self._changed:
            self._queue = deque(export for export in self._queue if export.handoff_id != revoke.handoff_id)
            if self._current is not None and self._current.handoff_id == revoke.handoff_id:
                self._waiting.append(done)
                return
        done()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (export := self._next()) is not None:
            checksums = self._hash(export)
            with self._changed:
                waiting, self._waiting, self._current = self._waiting, [], None
                if not waiting:  # under the lock, so that a revocation finds it in no exporter or in all
                    for exporter in self._exporters:
                        pages = Pages.of(self._space, export.pages)
                        exporter.add(export.handoff_id, export.attempt, export.first_ordinal, pages)
            if not waiting:
                self._post(Exported(export.handoff_id, export.attempt, export.first_ordinal, checksums))
            for done in waiting:
                done()

    def _next(self) -> RankExport | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            if self._is_closed:
                return None
            self._current = self._queue.popleft()
            return self._current

    def _pieces(self, export: RankExport) -> tuple[Slab, ...]:
        return export.pieces or (self._space.whole,)

    def _hash(self, export: RankExport) -> bytes:
        found = []
        for piece in self._pieces(export):
            pages = Pages.of(self._space, export.pages, piece)
            step = max(1, _HASH_BYTES // pages.bytes_each)
            for begin in range(0, len(pages.numbers), step):
                if self._waiting:
                    return b""
                found.append(hashing.hashes(pages.part(begin, begin + step)))
        return hashing.pack(np.concatenate(found)) if found else b""


class _Countdown:
    """Calls `done` when it has been called `count` times itself, from whatever threads."""

    def __init__(self, count: int, done: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._done = done

    def __call__(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count:
                return
        self._done()

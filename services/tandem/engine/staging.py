"""Copies KV pages between a GPU's pool and the shared memory that the transfer process maps, through pinned buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_SLOTS = 16  # pages of one half of the ring


class StagingRing:
    """Two halves of pinned memory: one is on its way over the bus while the host copies the other.

    `pool` is on the GPU and `mirror` in shared memory, both [page, ...]; page numbers are the same in both. Used by
    one thread.
    """

    def __init__(self, pool: torch.Tensor, mirror: torch.Tensor) -> None:
        self._pool = pool
        self._mirror = mirror
        self._halves = torch.empty((2, _SLOTS, *pool.shape[1:]), dtype=pool.dtype, pin_memory=True)
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]

    def publish(self, pages: Sequence[int], after: torch.cuda.Event) -> None:
        """Copy pages to the mirror as they are once `after` has happened. Returns when they are there."""
        waiting: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            for turn, numbers in enumerate(_parts(pages)):
                half = self._halves[turn % 2][: len(numbers)]
                half.copy_(self._pool[numbers.to(self._pool.device)], non_blocking=True)
                if waiting is not None:
                    self._land(*waiting)
                waiting = numbers, half, self._stream.record_event()
            if waiting is not None:
                self._land(*waiting)

    def adopt(self, pages: Sequence[int]) -> None:
        """Copy pages from the mirror to the pool, in the order of the current stream."""
        stream = torch.cuda.current_stream(self._pool.device)
        sent: list[torch.cuda.Event] = []
        for turn, numbers in enumerate(_parts(pages)):
            if turn >= 2:
                sent[turn - 2].synchronize()  # this half may still be on its way
            half = self._halves[turn % 2][: len(numbers)]
            torch.index_select(self._mirror, 0, numbers, out=half)
            self._pool[numbers.to(self._pool.device)] = half.to(self._pool.device, non_blocking=True)
            sent.append(stream.record_event())
        if sent:
            sent[-1].synchronize()  # the ring is free again

    def _land(self, numbers: torch.Tensor, half: torch.Tensor, done: torch.cuda.Event) -> None:
        done.synchronize()
        self._mirror[numbers] = half


def _parts(pages: Sequence[int]) -> list[torch.Tensor]:
    return [torch.tensor(pages[start : start + _SLOTS]) for start in range(0, len(pages), _SLOTS)]

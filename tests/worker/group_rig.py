"""A worker of several ranks as the transfer layer sees it: a real process and a pool a rank, and known KV.

The KV of a page is a known function of (page, layer, k|v, head, slot, dim), one number for each place in the model, so
that a piece that lands in a wrong place, or from a wrong one, cannot look right.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tandem.config import HandoffConfig, TransferConfig
from tandem.core.messages.handoff import Sharding
from tandem.core.messages.transfer import Export, Exported, Pull, PullEnded, TransferReady
from tandem.core.sharding import rank_parts
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory
from tandem.transfer.pages import PageSpace
from tandem.transfer.process import TransferProcess
from tandem.worker.transfer_group import TransferGroup
from tandem.worker.transfer_link import TransferLink

NUM_PAGES = 16
MODEL = KvLayout(num_pages=NUM_PAGES, num_layers=3, num_kv_heads=4, page_tokens=4, head_dim=4, dtype="float32")
Outcome = TypeVar("Outcome")
ModelKv = npt.NDArray[np.uint32]  # [page, layer, k|v, head, slot, dim]


def model_kv(seed: int) -> ModelKv:
    """Return the KV of all pages: every number occurs once, and none of another seed's."""
    shape = (MODEL.num_pages, *MODEL.page_shape)
    return np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) + np.uint32(seed << 24)


class RankedWorker:
    """`pools[rank]` is that rank's memory as [page, layer, k|v, head, slot, dim]. The test is its scheduler.

    `patience_seconds`: how long its transfer processes wait for a peer that stands still.
    """

    def __init__(self, sharding: Sharding, transport: str = "tcp", patience_seconds: float = 30.0) -> None:
        self.sharding = sharding
        self.parts = rank_parts(MODEL.num_layers, MODEL.num_kv_heads, sharding)
        self.adopted: list[list[int]] = [[] for _ in self.parts]
        self.pools: list[ModelKv] = []
        self.links: list[TransferLink] = []
        self._memories: list[PoolMemory] = []
        self._num_tickets = 0
        self._unclaimed: list[Any] = []
        config = TransferConfig(transport=transport, trusted_network=True, connections=2)  # type: ignore[arg-type]
        handoff = HandoffConfig(progress_seconds=patience_seconds, connect_seconds=patience_seconds)
        for rank, part in enumerate(self.parts):
            layout = MODEL.of_part(part)
            memory = PoolMemory.create(layout.pool_bytes)
            rows = PageSpace(memory.view, layout.page_bytes).rows
            self.pools.append(rows.view(np.uint32).reshape(layout.num_pages, *layout.page_shape))
            self._memories.append(memory)
            self.links.append(_link(config, handoff, memory, layout, self.adopted[rank]))
        self.group = TransferGroup(self.links, MODEL, sharding)
        self.ready = self.wait(TransferReady)

    def close(self) -> None:
        self.group.stop()
        self.pools.clear()
        for memory in self._memories:
            memory.close()

    def hold(self, kv: ModelKv) -> None:
        """Write each rank's part of the model's KV into its pool."""
        for pool, part in zip(self.pools, self.parts, strict=True):
            pool[:] = kv[:, part.first_layer : part.end_layer, :, part.first_head : part.end_head]

    def holds(self, kv: ModelKv, targets: Sequence[int], sources: Sequence[int]) -> bool:
        """Whether page targets[i] of every rank is its part of the model's page sources[i], byte for byte."""
        return all(
            np.array_equal(
                pool[list(targets)],
                kv[list(sources), part.first_layer : part.end_layer, :, part.first_head : part.end_head],
            )
            for pool, part in zip(self.pools, self.parts, strict=True)
        )

    def pid(self, rank: int) -> int:
        """Of the present life of a rank's process."""
        process = self.links[rank]._process
        assert process is not None
        return process.pid

    # ---- outcomes -------------------------------------------------------------------------------------------------

    def wait(
        self, kind: type[Outcome], matches: Callable[[Outcome], bool] = lambda _: True, seconds: float = 90.0
    ) -> Outcome:
        """Return the next outcome that matches; others are kept for later."""
        deadline = time.monotonic() + seconds
        while True:
            for outcome in self._unclaimed:
                if isinstance(outcome, kind) and matches(outcome):
                    self._unclaimed.remove(outcome)
                    return outcome
            assert time.monotonic() < deadline, f"no {kind.__name__} within {seconds} s; got {self._unclaimed}"
            self._unclaimed += self.hear(0.2)

    def hear(self, seconds: float) -> list[Any]:
        """Run the group for one turn of an event loop."""
        outcomes = self.group.advance()
        if not outcomes:
            self.group.flush()
            channels = self.group.channels
            sinks = [channel for channel in channels if channel.pending_bytes]
            select.select(channels, sinks, [], seconds)
        return outcomes + self.group.receive()

    # ---- commands -------------------------------------------------------------------------------------------------

    def export(
        self, handoff_id: bytes, pages: Sequence[int], importer: Sharding, attempt: int = 1, first_ordinal: int = 0
    ) -> Shared:
        self.group.send(Export(handoff_id, attempt, b"token", first_ordinal, tuple(pages), importer))
        exported = self.wait(Exported, lambda outcome: outcome.handoff_id == handoff_id)
        return Shared(self, handoff_id, attempt, first_ordinal, tuple(pages), exported.checksums)

    def begin_pull(self, shared: Shared, pages: Sequence[int], **changes: Any) -> int:
        """Pull everything shared into `pages` of every rank; returns the ticket."""
        self._num_tickets += 1
        first = shared.first_ordinal
        name = self.ready.imports[0]
        endpoints = shared.owner.ready.endpoints
        pull = Pull(
            ticket=self._num_tickets,
            endpoints=tuple(endpoint for endpoint in endpoints if endpoint.transport == name),
            exporter=shared.owner.sharding,
            handoff_id=shared.handoff_id,
            attempt=shared.attempt,
            token=b"token",
            ordinals=tuple(range(first, first + len(shared.pages))),
            checksums=shared.checksums,
            remote_pages=np.array(shared.pages, dtype="<u4").tobytes(),
            pages=tuple(pages),
        )
        self.group.send(replace(pull, **changes))
        return self._num_tickets

    def pull(self, shared: Shared, pages: Sequence[int], **changes: Any) -> PullEnded:
        return self.end_pull(self.begin_pull(shared, pages, **changes))

    def end_pull(self, ticket: int) -> PullEnded:
        return self.wait(PullEnded, lambda outcome: outcome.ticket == ticket)


@dataclass(frozen=True)
class Shared:
    """What a worker exported: everything that an importer learns from the control stream."""

    owner: RankedWorker
    handoff_id: bytes
    attempt: int
    first_ordinal: int
    pages: tuple[int, ...]
    checksums: bytes


def _link(
    config: TransferConfig, handoff: HandoffConfig, memory: PoolMemory, layout: KvLayout, adopted: list[int]
) -> TransferLink:
    def spawn() -> TransferProcess:
        return TransferProcess.spawn(config, handoff, memory, layout, "127.0.0.1")

    return TransferLink(spawn, time.monotonic, adopted.extend)

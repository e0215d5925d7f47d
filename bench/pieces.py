"""Speed of hand-offs between unequal tensor sizes: pieces of pages against whole pages, on loopback.

    python bench/pieces.py [--megabytes 64] [--rounds 5] [--transport tcp]

The pages are those of an 8B-class model with 8 KV heads (32 layers, 16 tokens, head size 128, bfloat16: 2 MiB).
whole: equal shardings, one run of bytes a page. 1 -> n: the exporter has all heads and the importing rank one n-th of
them, one run of bytes a layer and k|v. n -> 1: the other way round. Each way moves as many bytes; each end hashes them.
The ways run one after the other in each round; a ratio is the median of the rounds' ratios to `whole`.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tandem.config import HandoffConfig, TlsConfig, TransferConfig
from tandem.core.messages.transfer import (
    Exported,
    PullEnded,
    PullStatus,
    RankExport,
    RankPull,
    Slab,
    Source,
    TransferReady,
)
from tandem.core.sharding import KvPart
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory
from tandem.transfer.pages import PageSpace
from tandem.transfer.process import TransferProcess

MODEL = KvLayout(num_pages=1, num_layers=32, num_kv_heads=8, page_tokens=16, head_dim=128, dtype="bfloat16")
HANDOFF, TOKEN = b"bench-handoff-id", b"bench-token-0000"
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Way:
    """Heads of an exporting rank and of an importing one; the piece is the smaller one's whole page."""

    name: str
    exporter_heads: int
    importer_heads: int

    @property
    def heads(self) -> int:
        return min(self.exporter_heads, self.importer_heads)


WAYS = [Way("whole", 8, 8), Way("1 -> 2", 8, 4), Way("1 -> 8", 8, 1), Way("2 -> 1", 4, 8), Way("8 -> 1", 1, 8)]


class Rank:
    """A transfer process over a pool with so many heads."""

    def __init__(self, heads: int, num_pages: int, transport: str) -> None:
        self.layout = KvLayout(
            num_pages=num_pages,
            num_layers=MODEL.num_layers,
            num_kv_heads=heads,
            page_tokens=MODEL.page_tokens,
            head_dim=MODEL.head_dim,
            dtype=MODEL.dtype,
        )
        self._memory = PoolMemory.create(self.layout.pool_bytes)
        rows = PageSpace(self._memory.view, self.layout.page_bytes).rows
        rows[:] = np.random.default_rng(heads).integers(0, 256, self.layout.page_bytes, dtype=np.uint8)
        config = TransferConfig(transport=transport, connections=4, trusted_network=True)  # type: ignore[arg-type]
        self._process = TransferProcess.spawn(
            config, HandoffConfig(), self._memory, self.layout, "127.0.0.1", TlsConfig()
        )
        self.ready = self.wait(TransferReady)

    def slab(self, heads: int) -> Slab:
        return self.layout.slab(KvPart(0, MODEL.num_layers, 0, heads))

    def send(self, command: object) -> None:
        self._process.channel.send(command)
        self._process.channel.flush()

    def wait(self, kind: type[Outcome]) -> Outcome:
        os.set_blocking(self._process.channel.fileno(), True)
        while True:
            for outcome in self._process.channel.receive():
                if isinstance(outcome, kind):
                    return outcome

    def close(self) -> None:
        self._process.stop()
        self._memory.close()


class Run:
    """One way of handing over, ready to be measured again and again."""

    def __init__(self, way: Way, num_bytes: int, transport: str) -> None:
        self.num_pages = num_bytes // (MODEL.page_bytes // MODEL.num_kv_heads * way.heads)
        self._exporter = Rank(way.exporter_heads, self.num_pages, transport)
        self._importer = Rank(way.importer_heads, self.num_pages, transport)
        self._pages = random.Random(1).sample(range(self.num_pages), self.num_pages)
        self._targets = random.Random(2).sample(range(self.num_pages), self.num_pages)
        self._source, self._target = self._exporter.slab(way.heads), self._importer.slab(way.heads)
        self._transport = transport

    def seconds(self) -> float:
        """Hash and announce, pull and verify; pages are hashed while they travel, as in service."""
        began = time.perf_counter()
        export = RankExport(HANDOFF, 1, TOKEN, 0, tuple(self._pages), (self._source,))
        self._exporter.send(export)
        checksums = self._exporter.wait(Exported).checksums
        (endpoint,) = [one for one in self._exporter.ready.endpoints if one.transport == self._transport]
        pull = RankPull(
            ticket=1,
            endpoint=endpoint,
            handoff_id=HANDOFF,
            attempt=1,
            token=TOKEN,
            ordinals=tuple(range(self.num_pages)),
            checksums=checksums,
            remote_pages=np.array(self._pages, dtype="<u4").tobytes(),
            pages=tuple(self._targets),
            slab=self._target,
            source=Source(self._exporter.layout.page_bytes, self._source),
        )
        self._importer.send(pull)
        ended = self._importer.wait(PullEnded)
        assert (ended.status, ended.transport) == (PullStatus.DONE, self._transport), ended
        return time.perf_counter() - began

    def close(self) -> None:
        self._exporter.close()
        self._importer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of pieces of pages against whole pages.")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transport", default="tcp", choices=["tcp", "mooncake-tcp", "mooncake-rdma"])
    options = parser.parse_args()
    num_bytes = options.megabytes << 20
    runs = {way.name: Run(way, num_bytes, options.transport) for way in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(options.rounds + 1):
        for name, run in runs.items():
            took = run.seconds()
            if round_number:  # the first one warms up
                seconds[name].append(took)
    for name, run in runs.items():
        ratio = statistics.median(whole / own for whole, own in zip(seconds["whole"], seconds[name], strict=True))
        speed = num_bytes / statistics.median(seconds[name]) / 1e9
        print(
            f"{options.transport}  {name:7}  {run.num_pages:5d} pages  {speed:5.2f} GB/s  ratio {ratio:4.2f}",
            flush=True,
        )
        run.close()


if __name__ == "__main__":
    main()

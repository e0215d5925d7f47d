"""Speed of the TCP data plane against raw sockets, on loopback: prints GB/s and ratios.

    python bench/transfer.py [--megabytes 256] [--rounds 7] [--connections 4]

raw: as many connections between two processes, the same scattered pages by the same scatter-gather calls, 4 MiB each,
and nothing else: no requests, frames, grants, checks. plain: a real transfer process exports, importer's hashing off.
hashed: each end also hashes every page while they travel. tls: hashed, over mutual TLS 1.3.
They run one after the other in each round; a ratio is
the median of the rounds' ratios, so that the machine's load cancels out.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import trustme

from tandem.certificates import between_pods
from tandem.config import HandoffConfig, TlsConfig, TransferConfig
from tandem.core.messages.transfer import Exported, PullEnded, PullStatus, RankExport, RankPull, TransferReady
from tandem.transfer.iovec import Iovecs, Runs, advance, receive, send
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory
from tandem.transfer.pages import Pages, PageSpace
from tandem.transfer.process import TransferProcess
from tandem.transfer.pull_job import PullJob
from tandem.transfer.self_test import scratch
from tandem.transfer.tcp_importer import TcpImporter
from tandem.transfer.tcp_stream import TcpSettings
from tandem.transfer.tls import PeerTls

PAGE_BYTES = (32 << 10, 256 << 10, 2 << 20)
PIECE_BYTES = 4 << 20
HANDOFF, TOKEN = b"bench-handoff-id", b"bench-token-0000"
GOALS = {"plain": 0.9, "hashed": 0.65, "tls": 0.0}

Outcome = TypeVar("Outcome")


def scattered(num_pages: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(num_pages), num_pages)


def pieces(num_bytes: int, page_bytes: int, seed: int) -> tuple[PageSpace, list[Iovecs]]:
    """Touched memory, and the iovecs of all its pages in random order, PIECE_BYTES at a time."""
    space = scratch(num_bytes // page_bytes, page_bytes)
    space.rows[:] = 1
    runs = Runs.of(Pages.of(space, scattered(space.num_pages, seed)))
    return space, [runs.iovecs(begin, begin + PIECE_BYTES) for begin in range(0, num_bytes, PIECE_BYTES)]


def move(call: Callable[[socket.socket, Iovecs], int], sock: socket.socket, own: list[Iovecs]) -> None:
    for vectors in own:
        left = vectors
        while len(left):
            left = advance(left, call(sock, left))


class RawSockets:
    """A child that sends its share of the pages on a connection whenever it reads a byte there."""

    def __init__(self, num_bytes: int, page_bytes: int, num_connections: int) -> None:
        self._space, self._pieces = pieces(num_bytes, page_bytes, 2)
        listener = socket.create_server(("127.0.0.1", 0))
        numbers = (listener.getsockname()[1], num_bytes, page_bytes, num_connections)
        self._child = subprocess.Popen([sys.executable, __file__, "--raw-child", *map(str, numbers)])
        self._sockets = [listener.accept()[0] for _ in range(num_connections)]
        listener.close()

    def run(self) -> None:
        threads = [threading.Thread(target=self._receive, args=(index,)) for index in range(len(self._sockets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _receive(self, index: int) -> None:
        self._sockets[index].sendall(b"x")
        move(receive, self._sockets[index], self._pieces[index :: len(self._sockets)])

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._child.wait(10)


def raw_child(port: int, num_bytes: int, page_bytes: int, num_connections: int) -> None:
    _space, own = pieces(num_bytes, page_bytes, 1)

    def serve(index: int, sock: socket.socket) -> None:
        while sock.recv(1):
            move(send, sock, own[index::num_connections])

    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(num_connections)]
    threads = [threading.Thread(target=serve, args=numbered) for numbered in enumerate(sockets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class OurTransfer:
    """One exporting transfer process, and an importer in this process."""

    def __init__(self, num_bytes: int, page_bytes: int, num_connections: int, tls: TlsConfig) -> None:
        num_pages = num_bytes // page_bytes
        self._pages = scattered(num_pages, 1)
        self._targets = scattered(num_pages, 2)
        layout = KvLayout(
            num_pages=num_pages,
            num_layers=1,
            num_kv_heads=1,
            page_tokens=1,
            head_dim=page_bytes // 8,
            dtype="float32",
        )
        self._memory = PoolMemory.create(layout.pool_bytes)
        PageSpace(self._memory.view, page_bytes).rows[:] = np.arange(num_pages, dtype=np.uint32).astype(np.uint8)[
            :, None
        ]
        config = TransferConfig(transport="tcp", connections=num_connections)
        self._exporter = TransferProcess.spawn(config, HandoffConfig(), self._memory, layout, "127.0.0.1", tls)
        self._ready = self._wait(TransferReady)
        self._space = scratch(num_pages, page_bytes)
        self._space.rows[:] = 1  # touched, as a pool in use is
        certificates = between_pods(tls)
        settings = TcpSettings(
            connect_seconds=2.0,
            progress_seconds=10.0,
            idle_seconds=60.0,
            connections=num_connections,
            tls=PeerTls(certificates) if certificates is not None else None,
        )
        self._importer = TcpImporter(self._space, settings)
        self._export()
        self._checksums = self._wait(Exported).checksums

    def plain(self) -> None:
        verify, PullJob.verify = PullJob.verify, _accept  # type: ignore[method-assign, assignment]
        try:
            self._pull()
        finally:
            PullJob.verify = verify  # type: ignore[method-assign]

    def hashed(self) -> None:
        self._export()
        self._pull()
        self._wait(Exported)

    def close(self) -> None:
        self._importer.close()
        self._exporter.stop()
        self._memory.close()

    def _export(self) -> None:
        self._exporter.channel.send(RankExport(HANDOFF, 1, TOKEN, 0, tuple(self._pages)))
        self._exporter.channel.flush()

    def _pull(self) -> None:
        ended: list[PullEnded] = []
        is_over = threading.Event()
        pull = RankPull(
            ticket=1,
            endpoint=self._ready.endpoints[0],
            handoff_id=HANDOFF,
            attempt=1,
            token=TOKEN,
            ordinals=tuple(range(len(self._pages))),
            checksums=self._checksums,
            remote_pages=b"",
            pages=tuple(self._targets),
        )

        def done(outcome: PullEnded) -> None:
            ended.append(outcome)
            is_over.set()

        self._importer.pull(pull, done)
        is_over.wait()
        assert ended[0].status is PullStatus.DONE, ended[0]

    def _wait(self, kind: type[Outcome]) -> Outcome:
        os.set_blocking(self._exporter.channel.fileno(), True)
        while True:
            for outcome in self._exporter.channel.receive():
                if isinstance(outcome, kind):
                    return outcome


def _accept(job: PullJob, begin: int, end: int) -> None:
    job._verdicts[begin:end] = 1


def rate(run: Callable[[], None], num_bytes: int) -> float:
    start = time.perf_counter()
    run()
    return num_bytes / (time.perf_counter() - start) / 1e9


def measure(page_bytes: int, num_bytes: int, num_rounds: int, num_connections: int, folder: Path) -> None:
    raw_sockets = RawSockets(num_bytes, page_bytes, num_connections)
    transfer = OurTransfer(num_bytes, page_bytes, num_connections, TlsConfig())
    encrypted = OurTransfer(num_bytes, page_bytes, num_connections, pod_certificate(folder))
    runs = {"raw": raw_sockets.run, "plain": transfer.plain, "hashed": transfer.hashed, "tls": encrypted.hashed}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(num_rounds + 1):
        for name, run in runs.items():
            speed = rate(run, num_bytes)
            if round_number:  # the first one warms up
                rates[name].append(speed)
    cells = [f"raw {statistics.median(rates['raw']):5.2f} GB/s"]
    for name, goal in GOALS.items():
        ratio = statistics.median(ours / raw for ours, raw in zip(rates[name], rates["raw"], strict=True))
        told = f" (goal {goal})" if goal else ""
        cells.append(f"{name} {statistics.median(rates[name]):5.2f} GB/s  ratio {ratio:4.2f}{told}")
    print(f"{page_bytes >> 10:5d} KiB pages   " + "   ".join(cells), flush=True)
    raw_sockets.close()
    transfer.close()
    encrypted.close()


def pod_certificate(folder: Path) -> TlsConfig:
    """Make what all pods show, by an authority that is forgotten again."""
    authority = trustme.CA()
    pair = authority.issue_cert("tandem")
    names = [str(folder / name) for name in ("tls.crt", "tls.key", "ca.crt")]
    for name, pem in zip(names, (pair.cert_chain_pems[0], pair.private_key_pem, authority.cert_pem), strict=True):
        pem.write_to_path(name)
    return TlsConfig(peer_certificate_file=names[0], peer_key_file=names[1], peer_ca_file=names[2])


def main() -> None:
    if sys.argv[1:2] == ["--raw-child"]:
        raw_child(*(int(argument) for argument in sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description="Speed of the TCP data plane against raw sockets.")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--connections", type=int, default=4)
    options = parser.parse_args()
    for page_bytes in PAGE_BYTES:
        with tempfile.TemporaryDirectory() as folder:
            measure(page_bytes, options.megabytes << 20, options.rounds, options.connections, Path(folder))


if __name__ == "__main__":
    main()

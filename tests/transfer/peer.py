"""A rank as the tests see it: a pool with known bytes, and a transfer process, real or in this process."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tandem.config import HandoffConfig, TlsConfig, TransferConfig
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import (
    CancelPull,
    Exported,
    PullEnded,
    RankExport,
    RankPull,
    Revoke,
    Revoked,
    Slab,
    TransferReady,
)
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolMemory
from tandem.transfer.pages import PageSpace
from tandem.transfer.process import TransferProcess
from tandem.transfer.service import Service
from tests.certificates import Authority
from tests.fakes.transport_loopback import LOOPBACK, LoopbackExporter, LoopbackImporter

TCP_TLS = "tcp-tls"  # plain TCP between pods that have certificates
WAIT_SECONDS = 20.0
# A busy machine stops a program for seconds, and nothing is to be broken off for that. Even an eighth of this, when a
# blocked call looks up, is more than tests wait for an outcome: so what waits although it should not is seen.
PATIENT = HandoffConfig(progress_seconds=240.0, connect_seconds=240.0)
HASTY = HandoffConfig(progress_seconds=4.0, connect_seconds=4.0)  # for tests that wait for a break-off
Outcome = TypeVar("Outcome")
_tickets = itertools.count(1)


@functools.cache
def pod_tls() -> TlsConfig:
    """Return the certificate that the pods of this test run share."""
    return Authority(Path(tempfile.mkdtemp(prefix="tandem-tls-"))).pod()


def layout_of(num_pages: int, page_bytes: int) -> KvLayout:
    return KvLayout(
        num_pages=num_pages, num_layers=1, num_kv_heads=1, page_tokens=1, head_dim=page_bytes // 8, dtype="float32"
    )


class Pipe(Protocol):
    """Commands in, outcomes out."""

    def send(self, command: object) -> None: ...
    def receive(self, seconds: float) -> list[Any]: ...
    def stop(self) -> None: ...


class ProcessPipe:
    """A real transfer process."""

    def __init__(
        self, config: TransferConfig, handoff: HandoffConfig, memory: PoolMemory, layout: KvLayout, tls: TlsConfig
    ) -> None:
        self.process = TransferProcess.spawn(config, handoff, memory, layout, "127.0.0.1", tls)

    def send(self, command: object) -> None:
        self.process.channel.send(command)
        self.process.channel.flush()

    def receive(self, seconds: float) -> list[Any]:
        channel = self.process.channel
        channel.flush()
        sinks = [channel] if channel.pending_bytes else []
        readable, _, _ = select.select([channel], sinks, [], seconds)
        return channel.receive() if readable else []

    def stop(self) -> None:
        self.process.stop()


class LoopbackPipe:
    """The same service in this process, over the loopback transport."""

    def __init__(self, memory: PoolMemory, layout: KvLayout) -> None:
        space = PageSpace(memory.view, layout.page_bytes)
        self._outcomes: queue.Queue[Any] = queue.Queue()
        exporter = LoopbackExporter(os.urandom(16))
        importers = {LOOPBACK: LoopbackImporter(space)}
        self._service = Service(space, [exporter], importers, self._outcomes.put)
        self._outcomes.put(TransferReady(exporter.endpoint.instance_id, (exporter.endpoint,), (LOOPBACK,)))

    def send(self, command: Any) -> None:
        self._service.handle(command)

    def receive(self, seconds: float) -> list[Any]:
        try:
            return [self._outcomes.get(timeout=seconds)]
        except queue.Empty:
            return []

    def stop(self) -> None:
        self._service.close()


class Peer:
    """Owns the pool. `rows[page]` are its bytes."""

    def __init__(
        self,
        transport: str,
        num_pages: int = 64,
        page_bytes: int = 32 << 10,
        seed: int = 0,
        config: TransferConfig | None = None,
        handoff: HandoffConfig = PATIENT,
        tls: TlsConfig | None = None,
    ) -> None:
        self.layout = layout_of(num_pages, page_bytes)
        self.memory = PoolMemory.create(self.layout.pool_bytes)
        self.rows = PageSpace(self.memory.view, page_bytes).rows
        self.rows[:] = np.random.default_rng(seed).integers(0, 256, self.rows.shape, dtype=np.uint8)
        self.transport = "tcp" if transport == TCP_TLS else transport
        self.tls = tls or (pod_tls() if transport == TCP_TLS else TlsConfig())
        self._config = config or TransferConfig(trusted_network=True, connections=2)
        self._handoff = handoff
        self._unclaimed: list[Any] = []
        self.start()

    def start(self) -> None:
        """Spawn the transfer process, also again after it died."""
        if self.transport == LOOPBACK:
            self.pipe: Pipe = LoopbackPipe(self.memory, self.layout)
        else:
            config = replace(self._config, transport=self.transport)  # type: ignore[arg-type]
            self.pipe = ProcessPipe(config, self._handoff, self.memory, self.layout, self.tls)
        self.ready = self.wait(TransferReady)

    @property
    def pid(self) -> int:
        assert isinstance(self.pipe, ProcessPipe)
        return self.pipe.process.pid

    @property
    def endpoint(self) -> RankEndpoint:
        return self.ready.endpoints[0]

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the transfer process for a while. Inside, none of its threads runs any more."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            while _has_running_threads(self.pid):
                assert time.monotonic() < deadline, "the process does not stop"
                time.sleep(0.001)
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.pipe.stop()
        self.memory.close()

    # ---- outcomes -------------------------------------------------------------------------------------------------

    def wait(
        self, kind: type[Outcome], matches: Callable[[Outcome], bool] = lambda _: True, seconds: float = WAIT_SECONDS
    ) -> Outcome:
        """Return the next outcome that matches; others are kept for later."""
        deadline = time.monotonic() + seconds
        while True:
            for outcome in self._unclaimed:
                if isinstance(outcome, kind) and matches(outcome):
                    self._unclaimed.remove(outcome)
                    return outcome
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind.__name__} within {seconds} s; got {self._unclaimed}"
            self._unclaimed += self.pipe.receive(left)

    def drain(self, seconds: float) -> list[Any]:
        """Return all that has come, and comes within `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._unclaimed += self.pipe.receive(left)
        taken, self._unclaimed = self._unclaimed, []
        return taken

    # ---- commands -------------------------------------------------------------------------------------------------

    def export(
        self,
        handoff_id: bytes,
        pages: Sequence[int],
        attempt: int = 1,
        token: bytes = b"token",
        first_ordinal: int = 0,
        pieces: tuple[Slab, ...] = (),
    ) -> Shared:
        self.pipe.send(RankExport(handoff_id, attempt, token, first_ordinal, tuple(pages), pieces))
        exported = self.wait(Exported, lambda outcome: outcome.handoff_id == handoff_id)
        assert (exported.attempt, exported.first_ordinal) == (attempt, first_ordinal)
        return Shared(self, handoff_id, attempt, token, list(pages), first_ordinal, exported.checksums)

    def revoke(self, handoff_id: bytes) -> None:
        self.pipe.send(Revoke(handoff_id))
        self.wait(Revoked, lambda outcome: outcome.handoff_id == handoff_id)

    def begin_pull(self, shared: Shared, pages: Sequence[int], **changes: Any) -> int:
        """Pull everything shared into `pages`; returns the ticket. `changes` replace fields of RankPull."""
        ticket = next(_tickets)
        pull = RankPull(
            ticket=ticket,
            endpoint=shared.owner.endpoint,
            handoff_id=shared.handoff_id,
            attempt=shared.attempt,
            token=shared.token,
            ordinals=tuple(range(shared.first_ordinal, shared.first_ordinal + len(shared.pages))),
            checksums=shared.checksums,
            remote_pages=np.array(shared.pages, dtype="<u4").tobytes(),
            pages=tuple(pages),
        )
        self.pipe.send(replace(pull, **changes))
        return ticket

    def end_pull(self, ticket: int, seconds: float = WAIT_SECONDS) -> PullEnded:
        return self.wait(PullEnded, lambda outcome: outcome.ticket == ticket, seconds)

    def pull(self, shared: Shared, pages: Sequence[int], **changes: Any) -> PullEnded:
        return self.end_pull(self.begin_pull(shared, pages, **changes))

    def cancel(self, ticket: int) -> None:
        self.pipe.send(CancelPull(ticket))


def _has_running_threads(pid: int) -> bool:
    """Whether a process that was told to stop has a thread that did not yet."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                return True
    return False


class Shared:
    """What a peer exported: everything that an importer learns from the control stream."""

    def __init__(
        self,
        owner: Peer,
        handoff_id: bytes,
        attempt: int,
        token: bytes,
        pages: list[int],
        first_ordinal: int,
        checksums: bytes,
    ) -> None:
        self.owner = owner
        self.handoff_id = handoff_id
        self.attempt = attempt
        self.token = token
        self.pages = pages
        self.first_ordinal = first_ordinal
        self.checksums = checksums

"""Mooncake over its TCP, in real transfer processes. RDMA itself needs a device and is not run anywhere here."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tandem.config import TransferConfig
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullStatus, TransferReady, TransportFallback
from tandem.errors import TransportError
from tandem.transfer import mooncake
from tandem.transfer.assembly import Assembly
from tandem.transfer.channel import Launch
from tandem.transfer.mooncake import Mooncake, MooncakeEngine
from tandem.transfer.one_sided import OneSidedAddress, ReadState
from tandem.transfer.self_test import scratch
from tests.transfer.conftest import NewPeer
from tests.transfer.peer import HASTY, PATIENT, Peer, Shared, layout_of

NUM_PAGES = 512
PAGE_BYTES = 64 << 10
ALL = range(NUM_PAGES)
real = pytest.mark.mooncake


@pytest.fixture(scope="module")
def exporter() -> Iterator[Peer]:
    peer = Peer("mooncake-tcp", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=1)
    yield peer
    peer.close()


@pytest.fixture
def importer(new_peer: NewPeer) -> Peer:
    return new_peer("mooncake-tcp", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=2)


def with_session(shared: Shared, session: str) -> RankEndpoint:
    """The same peer, but its engine is said to be elsewhere."""
    address = replace(OneSidedAddress.decode(shared.owner.endpoint.address), session=session)
    return replace(shared.owner.endpoint, address=address.encode())


@real
def test_a_pair_whose_engine_fails_falls_back_once_and_visibly(exporter: Peer, importer: Peer) -> None:
    shared = exporter.export(os.urandom(16), ALL)
    broken = with_session(shared, "127.0.0.1:1")
    half = {"ordinals": tuple(range(256)), "checksums": shared.checksums[: 256 * 8], "remote_pages": bytes(256 * 4)}
    tickets = [importer.begin_pull(shared, ALL[256:], endpoint=broken, **half) for _ in range(3)]  # all fail at once
    for ended in [*map(importer.end_pull, tickets), importer.pull(shared, ALL, endpoint=broken)]:
        assert (ended.status, ended.transport) == (PullStatus.DONE, "tcp")
    assert np.array_equal(importer.rows, exporter.rows)
    fallbacks = [outcome for outcome in importer.drain(0.1) if isinstance(outcome, TransportFallback)]
    assert [(one.peer_instance_id, one.from_transport, one.to_transport) for one in fallbacks] == [
        (exporter.ready.instance_id, "mooncake-tcp", "tcp")
    ]
    assert fallbacks[0].message


@real
def test_strict_fails_instead(exporter: Peer, new_peer: NewPeer) -> None:
    config = TransferConfig(trusted_network=True, strict=True)
    strict = new_peer("mooncake-tcp", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, config=config)
    shared = exporter.export(os.urandom(16), ALL)
    assert strict.pull(shared, ALL, endpoint=with_session(shared, "127.0.0.1:1")).status is PullStatus.FAILED
    ended = strict.pull(shared, ALL)
    assert (ended.status, ended.transport) == (PullStatus.DONE, "mooncake-tcp")
    assert not [outcome for outcome in strict.drain(0.1) if isinstance(outcome, TransportFallback)]


def at(silent: socket.socket) -> str:
    """A session at a port where connections are let in and nobody speaks."""
    return f"127.0.0.1:{silent.getsockname()[1]}"


@real
def test_a_silent_engine_port_and_a_stopped_exporter_delay_nobody(
    exporter: Peer, importer: Peer, new_peer: NewPeer
) -> None:
    """The engine itself would hang for a minute, and every transfer of that engine with it."""
    other = new_peer("mooncake-tcp", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=3)
    held, shared = other.export(b"handoff", ALL), exporter.export(os.urandom(16), ALL)
    assert importer.pull(held, ALL).status is PullStatus.DONE
    with socket.create_server(("127.0.0.1", 0)) as silent, other.stopped():
        stuck = [
            importer.begin_pull(shared, ALL, endpoint=with_session(shared, at(silent))),
            importer.begin_pull(held, ALL),
        ]
        for _ in range(3):
            ended = importer.pull(shared, ALL)
            assert (ended.status, ended.transport) == (PullStatus.DONE, "mooncake-tcp")
        for ticket in stuck:
            importer.cancel(ticket)
        assert [importer.end_pull(ticket).status for ticket in stuck] == [PullStatus.CANCELLED] * 2
        importer.rows[:] = 0xA5
    time.sleep(0.5)  # late bytes would come now
    assert (importer.rows == 0xA5).all()
    assert importer.pull(held, ALL).status is PullStatus.DONE


@real
def test_who_stands_still_or_dies_is_broken_off_and_nothing_lands_later(exporter: Peer, new_peer: NewPeer) -> None:
    """A silent engine port, a stopped exporter and a killed one at once: all of them take the time-out.

    Of some reads from a dead process the engine never says that they failed.
    """
    importer = new_peer("mooncake-tcp", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=2, handoff=HASTY)
    stopped, dying = (new_peer("mooncake-tcp", num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=4) for _ in range(2))
    shared = exporter.export(os.urandom(16), ALL)
    held, lost = stopped.export(b"handoff", ALL), dying.export(b"handoff", ALL)
    assert {importer.pull(one, ALL).status for one in (held, lost)} == {PullStatus.DONE}
    under_way = [importer.begin_pull(one, ALL) for one in (held, lost)]
    with socket.create_server(("127.0.0.1", 0)) as silent, stopped.stopped(), dying.stopped():
        mute = importer.begin_pull(shared, ALL, endpoint=with_session(shared, at(silent)))
        begun = [importer.begin_pull(one, ALL) for one in (held, lost) for _ in range(4)]
        os.kill(dying.pid, signal.SIGKILL)
        ended = importer.end_pull(mute)
        assert (ended.status, ended.transport) == (PullStatus.DONE, "tcp")  # its pages came all the same
        assert {importer.end_pull(ticket).status for ticket in begun} == {PullStatus.FAILED}
        assert {importer.end_pull(ticket).status for ticket in under_way} <= {PullStatus.FAILED, PullStatus.DONE}
        importer.rows[:] = 0xA5
    time.sleep(0.5)  # late bytes would come now
    assert (importer.rows == 0xA5).all()
    assert importer.pull(held, ALL).status is PullStatus.DONE


@real
def test_a_pull_that_is_cancelled_mid_way_is_quiet_at_once(exporter: Peer, importer: Peer) -> None:
    shared = exporter.export(os.urandom(16), ALL)
    assert importer.pull(shared, ALL).status is PullStatus.DONE
    num_cancelled = 0
    for pause in (0.0, 0.001, 0.002, 0.004, 0.008):
        ticket = importer.begin_pull(shared, ALL)
        time.sleep(pause)
        importer.cancel(ticket)
        num_cancelled += importer.end_pull(ticket).status is PullStatus.CANCELLED
        importer.rows[:] = 0xA5
        time.sleep(0.1)
        assert (importer.rows == 0xA5).all()
    assert num_cancelled
    assert importer.pull(shared, ALL).status is PullStatus.DONE


# ---- without the library -----------------------------------------------------------------------------------------


def assembled(config: TransferConfig) -> list[object]:
    layout = layout_of(4, 4096)
    launch = Launch(
        transfer=config,
        handoff=PATIENT,
        layout=layout,
        worker_host="127.0.0.1",
        memory_fd=-1,
        memory_pages="ordinary",
        channel_fd=-1,
    )
    service, outcomes = Assembly(launch, scratch(4, 4096), lambda _: None).build()
    service.close()
    return list(outcomes)


def test_a_missing_library_is_a_visible_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "mooncake_absence", lambda: "libibverbs.so.1 is missing")
    ready, fallback = assembled(TransferConfig(transport="mooncake-tcp", trusted_network=True))
    assert isinstance(ready, TransferReady)
    assert isinstance(fallback, TransportFallback)
    assert (ready.imports, [endpoint.transport for endpoint in ready.endpoints]) == (("tcp",), ["tcp"])
    assert "libibverbs" in ready.notes[0]
    assert (fallback.from_transport, fallback.to_transport) == ("mooncake-tcp", "tcp")


def test_a_missing_library_with_strict_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "mooncake_absence", lambda: "libibverbs.so.1 is missing")
    outcomes = assembled(TransferConfig(transport="mooncake-tcp", trusted_network=True, strict=True))
    assert len(outcomes) == 1
    assert isinstance(outcomes[0], TransferReady)
    assert (outcomes[0].imports, outcomes[0].endpoints) == ((), ())


# ---- the library's traps, over a double of its module ------------------------------------------------------------


class EngineDouble:
    """Crashes where the library does."""

    def __init__(self) -> None:
        self.is_initialized = False
        self.reads: dict[int, int] = {}  # id: what its status will be

    def initialize(self, host: str, metadata: str, protocol: str, devices: str) -> int:
        self.is_initialized = protocol in ("tcp", "rdma") and metadata == "P2PHANDSHAKE"
        return 0 if self.is_initialized else -1

    def batch_register_memory(self, addresses: list[int], lengths: list[int]) -> int:
        assert self.is_initialized
        return -7 if len(set(addresses)) < len(addresses) else 0

    def batch_transfer_async_read(self, session: str, local: list[int], remote: list[int], lengths: list[int]) -> int:
        assert self.is_initialized
        assert len(local) == len(remote) == len(lengths) == 1  # a status covers the first entry only
        if session == "refused":
            return 0
        self.reads[len(self.reads) + 100] = 0
        return len(self.reads) + 99

    def transfer_check_status(self, read_id: int) -> int:
        code = self.reads[read_id]  # a KeyError here is a SIGSEGV there
        if code:
            del self.reads[read_id]
        return code


def double() -> tuple[EngineDouble, MooncakeEngine]:
    engine = EngineDouble()
    engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    return engine, MooncakeEngine(engine)


@pytest.mark.parametrize(("code", "state"), [(1, ReadState.DONE), (-1, ReadState.FAILED), (-2, ReadState.FAILED)])
def test_an_id_is_asked_for_until_it_is_over_and_never_again(code: int, state: ReadState) -> None:
    inner, engine = double()
    read = engine.submit("session", 1, 2, 3)
    assert read is not None
    assert engine.poll(read) is ReadState.RUNNING
    inner.reads[read] = code
    assert engine.poll(read) is state
    inner.reads[read] = 1
    with pytest.raises(KeyError):
        engine.poll(read)


def test_a_read_that_is_not_taken_has_no_id() -> None:
    _, engine = double()
    assert engine.submit("refused", 1, 2, 3) is None


def test_a_failed_registration_is_an_error() -> None:
    _, engine = double()
    engine.register_all([(1, 10), (20, 10)])
    with pytest.raises(TransportError, match="-7"):
        engine.register_all([(1, 10), (1, 10)])


@pytest.mark.parametrize(("transport", "forced"), [("mooncake-rdma", "MC_FORCE_HCA"), ("mooncake-tcp", "MC_FORCE_TCP")])
def test_the_environment_is_set_before_the_import(transport: str, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def load(name: str) -> SimpleNamespace:
        seen.update(os.environ)
        return SimpleNamespace(TransferEngine=EngineDouble)

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(mooncake, "mooncake_absence", lambda: "")
    monkeypatch.setattr("importlib.import_module", load)
    loaded = Mooncake(transport, TransferConfig(mooncake_port_min=16000), "::1")
    assert seen[forced] == "1"
    assert len({"MC_FORCE_HCA", "MC_FORCE_TCP"} & set(seen)) == 1
    assert int(seen["MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER"]) == 65535
    assert int(seen["MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER"]) == 65535
    assert (seen["MC_MIN_RPC_PORT"], seen["MC_USE_IPV6"]) == ("16000", "1")
    loaded.new_engine()

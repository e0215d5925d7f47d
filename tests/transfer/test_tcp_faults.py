"""What the TCP plane does when networks and peers misbehave: real processes, and a proxy that breaks the wire."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tandem.certificates import between_pods, peer_contexts
from tandem.config import TransferConfig
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullStatus, Revoke, Revoked
from tandem.transfer.tcp_stream import split_address
from tandem.transfer.wire import Hello, Request
from tests.fakes.transport_proxy import FaultProxy, Faults
from tests.transfer.conftest import NewPeer
from tests.transfer.peer import PROGRESS_SECONDS, TCP_TLS, Peer, Shared

PAGE_BYTES = 64 << 10
NUM_PAGES = 128  # 8 MiB
ALL = range(NUM_PAGES)


@pytest.fixture(scope="module", params=["tcp", TCP_TLS])
def plane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exporter(plane: str) -> Iterator[Peer]:
    peer = Peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=1)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def importer(plane: str) -> Iterator[Peer]:
    peer = Peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, seed=2)
    yield peer
    peer.close()


@pytest.fixture
def shared(exporter: Peer) -> Iterator[Shared]:
    handoff_id = os.urandom(16)
    yield exporter.export(handoff_id, ALL)
    exporter.revoke(handoff_id)


@pytest.fixture
def proxy(exporter: Peer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(exporter.endpoint.address)
    yield proxy
    proxy.close()


def through(proxy: FaultProxy, shared: Shared) -> RankEndpoint:
    return replace(shared.owner.endpoint, address=proxy.address)


def test_the_proxy_itself_is_harmless(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    assert importer.pull(shared, ALL, endpoint=through(proxy, shared)).status is PullStatus.DONE
    assert proxy.num_connections in (1, 2)


def test_a_flipped_byte_is_found_in_its_page_and_nowhere_else(
    importer: Peer, shared: Shared, proxy: FaultProxy, plane: str
) -> None:
    if plane == TCP_TLS:
        proxy.faults = Faults(flip_at=3 * PAGE_BYTES)
        ended = importer.pull(shared, ALL, endpoint=through(proxy, shared))
        assert ended.status is PullStatus.FAILED  # TLS does not let it through, and ends the connection
        assert "MAC" in ended.message.upper() or "RECORD" in ended.message.upper()
        return
    welcome, frame_head = 64, 64
    proxy.faults = Faults(flip_at=welcome + frame_head + 3 * PAGE_BYTES + 17, num_faulty=1)
    ended = importer.pull(shared, ALL, endpoint=through(proxy, shared))
    assert ended.status is PullStatus.MISMATCH
    assert len(ended.bad_ordinals) == 1
    assert ended.bad_ordinals[0] % (NUM_PAGES // 2) == 3  # of the first connection's part, whichever it took
    assert sorted(ended.good_ordinals + ended.bad_ordinals) == list(ALL)


@pytest.mark.parametrize("flip_at", [0, 7, 64, 69, 73, 81])
def test_a_flipped_byte_in_a_header_ends_the_pull(
    importer: Peer, shared: Shared, proxy: FaultProxy, flip_at: int
) -> None:
    proxy.faults = Faults(flip_at=flip_at)
    ended = importer.pull(shared, ALL, endpoint=through(proxy, shared))
    assert ended.status in (PullStatus.FAILED, PullStatus.REFUSED)


@pytest.mark.parametrize("cut_after", [0, 1, 63, 64, 70, 127, 128, 5000, 1 << 20, (2 << 20) + 3])
def test_a_cut_connection_ends_the_pull_and_what_arrived_is_good(
    exporter: Peer, importer: Peer, shared: Shared, proxy: FaultProxy, cut_after: int
) -> None:
    proxy.faults = Faults(cut_after=cut_after)
    ended = importer.pull(shared, ALL, endpoint=through(proxy, shared))
    assert ended.status is PullStatus.FAILED
    assert ended.bad_ordinals == ()
    good = list(ended.good_ordinals)
    assert np.array_equal(importer.rows[good], exporter.rows[good])


def test_a_pooled_connection_that_died_is_replaced_silently(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    endpoint = through(proxy, shared)
    assert importer.pull(shared, ALL, endpoint=endpoint).status is PullStatus.DONE
    num_pooled = proxy.num_connections
    proxy.cut_all()
    assert importer.pull(shared, ALL, endpoint=endpoint).status is PullStatus.DONE
    assert proxy.num_connections > num_pooled


def test_one_connection_that_is_left_serves_all(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    """A thread that cannot connect again passes its work on to those that are connected, and wakes them up."""
    endpoint = through(proxy, shared)
    proxy.faults = Faults(bytes_per_second=20e6)  # so slow that a second connection comes to help
    assert importer.pull(shared, ALL, endpoint=endpoint).status is PullStatus.DONE
    assert proxy.num_connections == 2
    proxy.stop_listening()
    proxy.cut(1)
    for _ in range(20):
        one = {"ordinals": (0,), "checksums": shared.checksums[:8], "remote_pages": b""}
        ticket = importer.begin_pull(shared, [0], endpoint=endpoint, **one)
        assert importer.end_pull(ticket, seconds=PROGRESS_SECONDS).status is PullStatus.DONE


def test_a_stalled_peer_is_broken_off_in_time_and_delays_nobody(
    importer: Peer, shared: Shared, proxy: FaultProxy
) -> None:
    proxy.faults = Faults(stall_after=1 << 20)
    start = time.monotonic()
    stuck = [importer.begin_pull(shared, ALL[:64], **first_half(shared, proxy)) for _ in range(4)]
    assert proxy.has_stalled.wait(5)
    for _ in range(5):
        begin = time.monotonic()
        assert importer.pull(shared, ALL).status is PullStatus.DONE
        assert time.monotonic() - begin < PROGRESS_SECONDS / 2
    for ticket in stuck:
        ended = importer.end_pull(ticket)
        assert ended.status is PullStatus.FAILED
        assert "progress" in ended.message or "missing" in ended.message
    assert PROGRESS_SECONDS * 0.9 < time.monotonic() - start < PROGRESS_SECONDS * 1.8


def first_half(shared: Shared, proxy: FaultProxy) -> dict[str, object]:
    return {
        "endpoint": through(proxy, shared),
        "ordinals": tuple(ALL[:64]),
        "checksums": shared.checksums[: 64 * 8],
        "remote_pages": b"",
    }


def test_a_slow_peer_is_not_a_stuck_one(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    proxy.faults = Faults(bytes_per_second=2.5e6)  # 4 MiB on each connection: longer than the time-out
    start = time.monotonic()
    assert importer.pull(shared, ALL, endpoint=through(proxy, shared)).status is PullStatus.DONE
    assert time.monotonic() - start > PROGRESS_SECONDS * 1.2


def test_a_cancelled_pull_is_quiet_at_once_and_nothing_lands_afterwards(
    importer: Peer, shared: Shared, proxy: FaultProxy
) -> None:
    proxy.faults = Faults(stall_after=(1 << 20) + 11)
    ticket = importer.begin_pull(shared, ALL, endpoint=through(proxy, shared))
    assert proxy.has_stalled.wait(5)
    start = time.monotonic()
    importer.cancel(ticket)
    ended = importer.end_pull(ticket)
    assert time.monotonic() - start < 0.1
    assert ended.status is PullStatus.CANCELLED
    importer.rows[:] = 0xA5  # the next owner
    proxy.release()
    time.sleep(0.2)
    assert (importer.rows == 0xA5).all()


def test_a_cancel_disturbs_no_sibling(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    proxy.faults = Faults(bytes_per_second=20e6)
    half = first_half(shared, proxy)
    other = importer.begin_pull(shared, ALL[64:], **half)
    ticket = importer.begin_pull(shared, ALL[:64], **half)
    time.sleep(0.02)
    importer.cancel(ticket)
    assert importer.end_pull(ticket).status is PullStatus.CANCELLED
    assert importer.end_pull(other).status is PullStatus.DONE


def test_a_queued_pull_is_cancelled_at_once(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    proxy.faults = Faults(stall_after=1 << 20)
    half = first_half(shared, proxy)
    tickets = [importer.begin_pull(shared, ALL[:64], **half) for _ in range(6)]
    assert proxy.has_stalled.wait(5)
    start = time.monotonic()
    for ticket in reversed(tickets):
        importer.cancel(ticket)
    for ticket in tickets:
        assert importer.end_pull(ticket).status is PullStatus.CANCELLED
    assert time.monotonic() - start < 0.1 * len(tickets)


def test_a_revocation_does_not_wait_for_a_stuck_importer(
    exporter: Peer, importer: Peer, shared: Shared, proxy: FaultProxy
) -> None:
    """The importer reads nothing: its sockets and the exporter's fill up, and a sendmsg hangs in the pages."""
    large = exporter.export(os.urandom(16), [*ALL] * 8)  # 64 MiB, more than any socket buffer takes
    with asking_and_not_reading(large):
        time.sleep(0.3)
        start = time.monotonic()
        exporter.pipe.send(Revoke(large.handoff_id))
        exporter.wait(Revoked, lambda outcome: outcome.handoff_id == large.handoff_id)
        assert time.monotonic() - start < 0.1
        assert importer.pull(shared, ALL).status is PullStatus.DONE


def test_a_reader_that_hangs_is_dropped(exporter: Peer) -> None:
    large = exporter.export(os.urandom(16), [*ALL] * 8)
    with asking_and_not_reading(large) as sock:
        time.sleep(PROGRESS_SECONDS * 1.5)
        received = 0
        with contextlib.suppress(OSError):
            while data := sock.recv(1 << 20):
                received += len(data)
    assert received < len(large.pages) * PAGE_BYTES
    exporter.revoke(large.handoff_id)


@contextlib.contextmanager
def asking_and_not_reading(shared: Shared) -> Iterator[socket.socket]:
    endpoint = shared.owner.endpoint
    with contextlib.ExitStack() as stack:
        sock: socket.socket = stack.enter_context(socket.create_connection(split_address(endpoint.address)))
        if (certificates := between_pods(shared.owner.tls)) is not None:
            client, _ = peer_contexts(certificates.current)
            sock = stack.enter_context(client.wrap_socket(sock, server_hostname=shared.owner.tls.peer_name))
        sock.sendall(Hello(endpoint.instance_id, os.urandom(32)).encode())
        request = Request(
            sequence=1,
            handoff_id=shared.handoff_id,
            attempt=shared.attempt,
            token=shared.token,
            piece_bytes=PAGE_BYTES,
            ordinals=np.arange(len(shared.pages)),
        )
        sock.sendall(request.encode())
        yield sock


def test_a_port_that_is_silent_fails_within_the_connect_time(importer: Peer, shared: Shared) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        ticket = importer.begin_pull(shared, ALL, endpoint=replace(shared.owner.endpoint, address=address))
        assert importer.pull(shared, ALL).status is PullStatus.DONE  # nobody else waits
        ended = importer.end_pull(ticket)
        assert ended.status is PullStatus.FAILED
        assert time.monotonic() - start < PROGRESS_SECONDS * 1.5


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1",
        "nowhere.invalid:80",
        "",
        "127.0.0.1",
        "[::1]:http",
        "a/b/c",
        "a..b:80",
        "\0:80",
        "127.0.0.1:99999",
        "x" * 300 + ":80",
    ],
)
def test_an_address_where_nobody_is_fails(importer: Peer, shared: Shared, address: str) -> None:
    ended = importer.pull(shared, ALL, endpoint=replace(shared.owner.endpoint, address=address))
    assert ended.status is PullStatus.FAILED


@pytest.mark.parametrize("changes", [{"token": b"t" * 65}, {"token": b"t" * 300}, {"handoff_id": b"h" * 300}])
def test_a_token_over_the_limit_fails_and_harms_nobody(
    importer: Peer, shared: Shared, changes: dict[str, bytes]
) -> None:
    assert importer.pull(shared, ALL, **changes).status is PullStatus.FAILED
    assert importer.pull(shared, ALL).status is PullStatus.DONE


def test_an_exporter_killed_mid_pull(new_peer: NewPeer, plane: str) -> None:
    many = range(1024)  # 64 MiB: more than the kernel's buffers hold for a dead process
    dying = new_peer(plane, num_pages=len(many), page_bytes=PAGE_BYTES)
    importer = new_peer(plane, num_pages=len(many), page_bytes=PAGE_BYTES)
    shared = dying.export(b"handoff", many)
    proxy = FaultProxy(dying.endpoint.address, Faults(stall_after=1 << 20))
    ticket = importer.begin_pull(shared, many, endpoint=through(proxy, shared))
    assert proxy.has_stalled.wait(5)
    os.kill(dying.pid, signal.SIGKILL)
    proxy.release()
    start = time.monotonic()
    ended = importer.end_pull(ticket)
    assert time.monotonic() - start < 0.5
    assert (ended.status, ended.bad_ordinals) == (PullStatus.FAILED, ())
    good = list(ended.good_ordinals)
    assert np.array_equal(importer.rows[good], dying.rows[good])
    proxy.close()


def test_a_restarted_exporter_on_the_same_port_is_another_one(importer: Peer, new_peer: NewPeer, plane: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    peer = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, config=TransferConfig(port=port))
    shared, old = peer.export(b"handoff", ALL), peer.endpoint
    assert importer.pull(shared, ALL).status is PullStatus.DONE
    os.kill(peer.pid, signal.SIGKILL)
    peer.pipe.stop()
    peer.start()
    assert peer.endpoint.address == old.address
    again = peer.export(b"handoff", ALL)
    ended = importer.pull(again, ALL, endpoint=old)
    assert (ended.status, "another process" in ended.message) == (PullStatus.FAILED, True)
    assert importer.pull(again, ALL).status is PullStatus.DONE


def stop(pid: int) -> None:
    """Stop a process, and return only once none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5.0
    threads = [Path(f"/proc/{pid}/task/{thread}/stat") for thread in os.listdir(f"/proc/{pid}/task")]
    while any(thread.read_text().rpartition(")")[2].split()[0] != "T" for thread in threads):
        assert time.monotonic() < deadline, "the process does not stop"
        time.sleep(0.001)


def test_a_stopped_exporter_is_broken_off_and_delays_nobody(
    exporter: Peer, importer: Peer, shared: Shared, new_peer: NewPeer, plane: str
) -> None:
    stopped = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)
    held = stopped.export(b"handoff", ALL)
    assert importer.pull(held, ALL).status is PullStatus.DONE  # connections are pooled now
    stop(stopped.pid)
    try:
        start = time.monotonic()
        tickets = [importer.begin_pull(held, ALL) for _ in range(5)]
        for _ in range(5):
            begin = time.monotonic()
            assert importer.pull(shared, ALL).status is PullStatus.DONE
            assert time.monotonic() - begin < PROGRESS_SECONDS / 2
        for ticket in tickets:
            assert importer.end_pull(ticket).status is PullStatus.FAILED
        assert time.monotonic() - start < PROGRESS_SECONDS * 1.8
        importer.rows[:] = 0xA5
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    time.sleep(0.3)  # late bytes would come now
    assert (importer.rows == 0xA5).all()
    assert importer.pull(held, ALL).status is PullStatus.DONE


def test_a_stopped_importer_delays_no_other(
    exporter: Peer, importer: Peer, shared: Shared, new_peer: NewPeer, plane: str
) -> None:
    stopped = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)
    stopped.begin_pull(shared, ALL)
    stop(stopped.pid)
    try:
        for _ in range(5):
            begin = time.monotonic()
            assert importer.pull(shared, ALL).status is PullStatus.DONE
            assert time.monotonic() - begin < PROGRESS_SECONDS / 2
        start = time.monotonic()
        other = exporter.export(os.urandom(16), ALL)
        exporter.revoke(other.handoff_id)
        assert time.monotonic() - start < 0.2
    finally:
        os.kill(stopped.pid, signal.SIGCONT)


def test_an_importer_killed_mid_pull_leaves_nothing_at_the_exporter(
    exporter: Peer, shared: Shared, new_peer: NewPeer, plane: str
) -> None:
    dying = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)
    dying.begin_pull(shared, ALL)
    os.kill(dying.pid, signal.SIGKILL)
    start = time.monotonic()
    exporter.revoke(shared.handoff_id)
    assert time.monotonic() - start < 0.2
    dying.pipe.stop()
    dying.start()
    again = exporter.export(os.urandom(16), ALL)
    assert dying.pull(again, ALL).status is PullStatus.DONE

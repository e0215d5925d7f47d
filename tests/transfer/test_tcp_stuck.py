"""Peers of the TCP plane that stand still: they delay nobody, and are broken off in time. Slow ones are served."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import psutil

from tandem.certificates import between_pods, peer_contexts
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullStatus, Revoke, Revoked
from tandem.transfer.tcp_stream import split_address
from tandem.transfer.wire import Hello, Request
from tests.fakes.transport_proxy import FaultProxy, Faults
from tests.transfer.conftest import ALL, NUM_PAGES, PAGE_BYTES, NewPeer, first_pages, through
from tests.transfer.peer import HASTY, WAIT_SECONDS, Peer, Shared


def assert_nobody_waits(importer: Peer, shared: Shared, stuck: Sequence[int]) -> None:
    """Others are served while these pulls are stuck. Peers are patient: who waits for those waits for too long."""
    for _ in range(5):
        assert importer.pull(shared, ALL).status is PullStatus.DONE
    for ticket in stuck:
        importer.cancel(ticket)
    for ticket in stuck:
        assert importer.end_pull(ticket).status is PullStatus.CANCELLED, "it was not stuck"


def at(silent: socket.socket, shared: Shared) -> RankEndpoint:
    """The same peer, but at a port where connections are let in and nobody speaks."""
    return replace(shared.owner.endpoint, address=f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_stalled_peer_delays_nobody(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    proxy.faults = Faults(stall_after=1 << 20)
    stuck = [importer.begin_pull(shared, ALL[:64], **first_pages(64, shared, proxy)) for _ in range(4)]
    assert proxy.has_stalled.wait(WAIT_SECONDS)
    assert_nobody_waits(importer, shared, stuck)


def test_a_port_that_is_silent_delays_nobody(importer: Peer, shared: Shared) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ticket = importer.begin_pull(shared, ALL, endpoint=at(silent, shared))
        assert_nobody_waits(importer, shared, [ticket])


def test_a_stopped_exporter_delays_nobody(importer: Peer, shared: Shared, new_peer: NewPeer, plane: str) -> None:
    exporter = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)
    held = exporter.export(b"handoff", ALL)
    assert importer.pull(held, ALL).status is PullStatus.DONE  # connections are pooled now
    with exporter.stopped():
        assert_nobody_waits(importer, shared, [importer.begin_pull(held, ALL) for _ in range(5)])


def test_a_stopped_importer_delays_no_other(
    exporter: Peer, importer: Peer, shared: Shared, new_peer: NewPeer, plane: str
) -> None:
    other = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)
    other.begin_pull(shared, ALL)
    with other.stopped():
        assert_nobody_waits(importer, shared, [])
        exporter.revoke(exporter.export(os.urandom(16), ALL).handoff_id)


def test_a_revocation_does_not_wait_for_a_stuck_importer(exporter: Peer, importer: Peer, shared: Shared) -> None:
    """The importer reads nothing: its sockets and the exporter's fill up, and a sendmsg hangs in the pages."""
    large = exporter.export(os.urandom(16), [*ALL] * 8)  # 64 MiB, more than any socket buffer takes
    with asking_and_not_reading(large) as sock:
        wait_until_full(sock)
        exporter.pipe.send(Revoke(large.handoff_id))
        exporter.wait(Revoked, lambda outcome: outcome.handoff_id == large.handoff_id)
        assert importer.pull(shared, ALL).status is PullStatus.DONE


def wait_until_full(sock: socket.socket) -> None:
    """Until bytes have come that nobody reads, and for a while no more do."""
    deadline = time.monotonic() + WAIT_SECONDS
    before, unread = -1, 0
    while unread == 0 or unread != before:
        assert time.monotonic() < deadline
        time.sleep(0.3)
        before, unread = unread, int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


# ---- what is broken off, and when ------------------------------------------------------------------------------------


def test_who_stands_still_is_broken_off_in_time(
    shared: Shared, proxy: FaultProxy, new_peer: NewPeer, plane: str
) -> None:
    """A connection that stalls, a port that is silent, and a program that is stopped, all at the same time."""
    importer = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, handoff=HASTY)
    exporter = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)
    held = exporter.export(b"handoff", ALL)
    assert importer.pull(held, ALL).status is PullStatus.DONE  # connections are pooled now
    proxy.faults = Faults(stall_after=1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as silent, exporter.stopped():
        start = time.monotonic()
        stalled = [importer.begin_pull(shared, ALL[:64], **first_pages(64, shared, proxy)) for _ in range(6)]
        others = [importer.begin_pull(held, ALL) for _ in range(5)]
        others.append(importer.begin_pull(shared, ALL, endpoint=at(silent, shared)))
        for ticket in stalled:
            ended = importer.end_pull(ticket)
            assert ended.status is PullStatus.FAILED
            assert "progress" in ended.message or "missing" in ended.message
        assert time.monotonic() - start > HASTY.progress_seconds * 0.9
        assert {importer.end_pull(ticket).status for ticket in others} == {PullStatus.FAILED}
        # What waits behind a stuck connection fails with it. Else each pull would connect twice, and wait, anew.
        assert proxy.num_connections < 2 * len(stalled)
        importer.rows[:] = 0xA5
        proxy.release()
    time.sleep(0.3)  # late bytes would come now
    assert (importer.rows == 0xA5).all()
    assert importer.pull(held, ALL).status is PullStatus.DONE


def test_a_slow_peer_is_served_and_a_reader_that_hangs_is_dropped(new_peer: NewPeer, plane: str) -> None:
    exporter = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, handoff=HASTY, seed=1)
    importer = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, handoff=HASTY)
    shared, large = exporter.export(b"shared", ALL), exporter.export(b"large", [*ALL] * 8)
    # 4 MiB on each connection: longer than the time-out.
    proxy = FaultProxy(exporter.endpoint.address, Faults(bytes_per_second=(4 << 20) / (1.5 * HASTY.progress_seconds)))
    start = time.monotonic()
    ticket = importer.begin_pull(shared, ALL, endpoint=through(proxy, shared))
    with asking_and_not_reading(large) as sock:
        for is_served in (True, False):
            wait_for_connection(exporter, sock.getsockname(), is_served)
        received = 0
        with contextlib.suppress(OSError):
            while data := sock.recv(1 << 20):
                received += len(data)
    assert received < len(large.pages) * PAGE_BYTES
    assert importer.end_pull(ticket).status is PullStatus.DONE
    assert time.monotonic() - start > HASTY.progress_seconds * 1.4
    proxy.close()


def wait_for_connection(exporter: Peer, address: tuple[str, int], is_there: bool) -> None:
    """Until the exporter has a connection to that address, or has none any more."""
    process = psutil.Process(exporter.pid)
    deadline = time.monotonic() + WAIT_SECONDS
    while (address in [one.raddr for one in process.net_connections()]) != is_there:
        assert time.monotonic() < deadline, f"connected: {not is_there}"
        time.sleep(0.02)


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

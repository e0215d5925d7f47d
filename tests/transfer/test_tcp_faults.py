"""What the TCP plane does when networks and peers misbehave: real processes, and a proxy that breaks the wire.

Nothing here is broken off for want of progress: the peers are patient (`test_tcp_stuck.py` has those that are not). So
a pull that ends did so at once, and needs no stop-watch.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace

import numpy as np
import pytest

from tandem.config import TransferConfig
from tandem.core.messages.transfer import PullStatus
from tests.fakes.transport_proxy import FaultProxy, Faults
from tests.transfer.conftest import ALL, NUM_PAGES, PAGE_BYTES, NewPeer, first_pages, through
from tests.transfer.peer import TCP_TLS, WAIT_SECONDS, Peer, Shared


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
    proxy.faults = Faults(flip_at=welcome + frame_head + 3 * PAGE_BYTES + 17)
    ended = importer.pull(shared, ALL, endpoint=through(proxy, shared))
    assert ended.status is PullStatus.MISMATCH
    # The fourth page that comes over each connection: of both halves, or of one if a connection took both.
    assert 1 <= len(ended.bad_ordinals) <= 2
    assert {ordinal % (NUM_PAGES // 2) for ordinal in ended.bad_ordinals} == {3}
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


def test_one_connection_that_is_left_serves_all(exporter: Peer, importer: Peer, shared: Shared) -> None:
    """A thread that cannot connect again passes its work on to those that are connected, and wakes them up.

    Which thread gets the work first is chance, so this is tried some times.
    """
    for _ in range(8):
        proxy = FaultProxy(exporter.endpoint.address, Faults(stall_after=1 << 20))
        ticket = importer.begin_pull(shared, ALL, endpoint=through(proxy, shared))
        assert proxy.wait_for_stalls(2, WAIT_SECONDS)  # so there are two connections, each with half of the pages
        proxy.release()
        assert importer.end_pull(ticket).status is PullStatus.DONE
        proxy.stop_listening()
        proxy.cut(1)
        for _ in range(5):
            assert importer.pull(shared, [0], **first_pages(1, shared, proxy)).status is PullStatus.DONE
        proxy.close()


def test_a_cancelled_pull_is_quiet_at_once_and_nothing_lands_afterwards(
    importer: Peer, shared: Shared, proxy: FaultProxy
) -> None:
    proxy.faults = Faults(stall_after=(1 << 20) + 11)
    ticket = importer.begin_pull(shared, ALL, endpoint=through(proxy, shared))
    assert proxy.has_stalled.wait(WAIT_SECONDS)
    importer.cancel(ticket)
    assert importer.end_pull(ticket).status is PullStatus.CANCELLED
    importer.rows[:] = 0xA5  # the next owner
    proxy.release()
    time.sleep(0.2)
    assert (importer.rows == 0xA5).all()


def test_a_cancel_disturbs_no_sibling(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    """Two pulls, each in one part on a connection of its own, and both in the middle of it."""
    proxy.faults = Faults(stall_after=1 << 19)
    small = first_pages(16, shared, proxy)  # 1 MiB: less is not worth a second connection
    other = importer.begin_pull(shared, ALL[64:80], **small)
    ticket = importer.begin_pull(shared, ALL[:16], **small)
    assert proxy.wait_for_stalls(2, WAIT_SECONDS)
    importer.cancel(ticket)
    assert importer.end_pull(ticket).status is PullStatus.CANCELLED
    proxy.release()
    assert importer.end_pull(other).status is PullStatus.DONE


def test_a_queued_pull_is_cancelled_at_once(importer: Peer, shared: Shared, proxy: FaultProxy) -> None:
    proxy.faults = Faults(stall_after=1 << 20)
    tickets = [importer.begin_pull(shared, ALL[:64], **first_pages(64, shared, proxy)) for _ in range(6)]
    assert proxy.has_stalled.wait(WAIT_SECONDS)
    for ticket in reversed(tickets):
        importer.cancel(ticket)
    for ticket in tickets:
        assert importer.end_pull(ticket).status is PullStatus.CANCELLED


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
    assert proxy.has_stalled.wait(WAIT_SECONDS)
    os.kill(dying.pid, signal.SIGKILL)
    proxy.release()
    ended = importer.end_pull(ticket)
    assert (ended.status, ended.bad_ordinals) == (PullStatus.FAILED, ())
    good = list(ended.good_ordinals)
    assert np.array_equal(importer.rows[good], dying.rows[good])
    proxy.close()


def test_a_restarted_exporter_on_the_same_port_is_another_one(importer: Peer, new_peer: NewPeer, plane: str) -> None:
    with socket.socket() as holder:  # bound, so that the port is given to nobody who asks for any, but not listening
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        config = TransferConfig(port=holder.getsockname()[1])
        peer = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES, config=config)
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


def test_an_importer_killed_mid_pull_leaves_nothing_at_the_exporter(
    exporter: Peer, shared: Shared, new_peer: NewPeer, plane: str
) -> None:
    dying = new_peer(plane, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)
    dying.begin_pull(shared, ALL)
    os.kill(dying.pid, signal.SIGKILL)
    exporter.revoke(shared.handoff_id)
    dying.pipe.stop()
    dying.start()
    again = exporter.export(os.urandom(16), ALL)
    assert dying.pull(again, ALL).status is PullStatus.DONE

"""The transfer process itself: how it starts, dies, is replaced, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tandem.config import TransferConfig
from tandem.core.messages.transfer import Exported, PullEnded, PullStatus, RankExport
from tandem.ipc import ChannelClosed
from tests.transfer.conftest import PROCESS_TRANSPORTS, NewPeer
from tests.transfer.peer import TCP_TLS, WAIT_SECONDS, Peer, ProcessPipe


def kill(peer: Peer) -> None:
    """Kill the transfer process, and see it go as the rank does."""
    os.kill(peer.pid, signal.SIGKILL)
    with pytest.raises(ChannelClosed):
        peer.wait(PullEnded)
    peer.pipe.stop()


@pytest.mark.parametrize("transport", PROCESS_TRANSPORTS)
def test_ready_names_a_fresh_instance_and_what_it_can_do(transport: str, new_peer: NewPeer) -> None:
    peers = [new_peer(transport) for _ in range(2)]
    for peer in peers:
        assert len(peer.ready.instance_id) == 16
        assert peer.ready.endpoints[0].transport == peer.transport
        assert {endpoint.instance_id for endpoint in peer.ready.endpoints} == {peer.ready.instance_id}
        assert peer.ready.imports == tuple(dict.fromkeys([peer.transport, "tcp"]))
    assert peers[0].ready.instance_id != peers[1].ready.instance_id


def test_strict_offers_no_second_transport(new_peer: NewPeer) -> None:
    pytest.importorskip("mooncake")
    peer = new_peer("mooncake-tcp", config=TransferConfig(trusted_network=True, strict=True))
    if not peer.ready.endpoints:
        pytest.skip("; ".join(peer.ready.notes))
    assert [endpoint.transport for endpoint in peer.ready.endpoints] == ["mooncake-tcp"]
    assert peer.ready.imports == ("mooncake-tcp",)


def test_the_self_test_leaves_the_pool_alone(new_peer: NewPeer) -> None:
    peer = new_peer("tcp", seed=5)
    expected = np.random.default_rng(5).integers(0, 256, peer.rows.shape, dtype=np.uint8)
    assert np.array_equal(peer.rows, expected)


def test_a_port_in_use_is_a_note_and_no_crash(new_peer: NewPeer) -> None:
    first = new_peer("tcp")
    port = int(first.endpoint.address.rpartition(":")[2])
    second = new_peer("tcp", config=TransferConfig(port=port))
    assert (second.ready.endpoints, second.ready.imports) == ((), ())
    assert "cannot listen" in second.ready.notes[0]


@pytest.mark.parametrize("transport", PROCESS_TRANSPORTS)
def test_both_sides_can_be_killed_and_spawned_again(transport: str, new_peer: NewPeer) -> None:
    exporter, importer = new_peer(transport, seed=1), new_peer(transport, seed=2)
    shared = exporter.export(b"handoff", range(10))
    assert importer.pull(shared, range(10)).status is PullStatus.DONE
    kill(importer)
    importer.rows[:] = 0
    importer.start()
    assert importer.pull(shared, range(10)).status is PullStatus.DONE  # the same memory
    assert np.array_equal(importer.rows[:10], exporter.rows[:10])
    old = exporter.endpoint
    kill(exporter)
    assert importer.pull(shared, range(10), endpoint=old).status is PullStatus.FAILED
    exporter.start()
    assert exporter.endpoint.instance_id != old.instance_id
    again = exporter.export(b"handoff", range(10, 20))
    assert importer.pull(again, range(10)).status is PullStatus.DONE
    assert np.array_equal(importer.rows[:10], exporter.rows[10:20])


def test_amid_a_pull_it_ends_by_itself_when_told_to_stop(new_peer: NewPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.transfer.process._END_SECONDS", 30.0)  # before it would be killed
    exporter, importer = new_peer("tcp"), new_peer("tcp")
    shared, pid = exporter.export(b"handoff", range(10)), importer.pid
    with exporter.stopped():  # its threads wait for what does not come
        importer.begin_pull(shared, range(10))
        importer.pipe.stop()
    assert isinstance(importer.pipe, ProcessPipe)
    assert importer.pipe.process._child.returncode == 0
    assert not psutil.pid_exists(pid)


def test_a_process_that_does_not_end_is_killed(new_peer: NewPeer) -> None:
    peer = new_peer("tcp")
    pid = peer.pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    peer.pipe.stop()
    assert time.monotonic() - start < 15.0  # 1 s is what it gets to end
    assert not psutil.pid_exists(pid)


def test_it_ends_when_the_rank_dies() -> None:
    """Killed, so that nobody closes anything in order."""
    script = (
        "import time\n"
        "from tests.transfer.peer import Peer\n"
        "peer = Peer('tcp')\n"
        "print(peer.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    rank = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert rank.stdout is not None
    child = psutil.Process(int(rank.stdout.readline()))
    rank.kill()
    rank.wait()
    rank.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)  # where nobody reaps orphans


def test_signals_of_the_terminal_do_not_end_it(new_peer: NewPeer) -> None:
    exporter, importer = new_peer("tcp"), new_peer("tcp")
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(exporter.pid, number)
    assert importer.pull(exporter.export(b"handoff", range(5)), range(5)).status is PullStatus.DONE


def test_it_has_no_other_descriptor_of_the_rank(new_peer: NewPeer) -> None:
    with open(os.devnull, "rb") as stranger:
        os.set_inheritable(stranger.fileno(), True)
        peer = new_peer("tcp")
        names = set()
        for fd in os.listdir(f"/proc/{peer.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # a connection of its self-test that closes now
                names.add(os.readlink(f"/proc/{peer.pid}/fd/{fd}"))
    assert sum("tandem-kv-pool" in name for name in names) == 1
    assert len([name for name in names if name == os.devnull]) <= 1  # its standard input


def test_it_does_not_block_when_nobody_reads_its_outcomes(new_peer: NewPeer) -> None:
    exporter = new_peer("tcp", num_pages=2048, page_bytes=512)
    for number in range(200):
        exporter.pipe.send(RankExport(number.to_bytes(8, "little"), 1, b"token", 0, tuple(range(2048))))
    for _ in range(200):
        exporter.wait(Exported)


@pytest.mark.parametrize("transport", PROCESS_TRANSPORTS)
def test_a_thousand_handoffs_leak_nothing(transport: str, new_peer: NewPeer) -> None:
    exporter, importer = new_peer(transport, page_bytes=4096), new_peer(transport, page_bytes=4096)

    def hand_off(number: int) -> None:
        shared = exporter.export(number.to_bytes(16, "little"), [number % 64, (number + 9) % 64])
        ticket = importer.begin_pull(shared, [1, 2])
        if number % 10 == 3:
            importer.cancel(ticket)
        ended = importer.end_pull(ticket)
        assert ended.status in (PullStatus.DONE, PullStatus.CANCELLED)
        exporter.revoke(shared.handoff_id)

    def usage() -> list[tuple[int, int]]:
        found = []
        for peer in (exporter, importer):
            process = psutil.Process(peer.pid)
            found.append((process.num_fds(), process.num_threads()))
        return found

    for number in range(20):
        hand_off(number)
    time.sleep(0.3)
    before = usage()
    for number in range(1000):
        hand_off(number)
    # TCP has up to two connections, with a thread each. Mooncake opens some as it pleases, up to four a peer.
    lanes = 2 if transport in ("tcp", TCP_TLS) else 8
    most = [(num_fds + lanes, num_threads + 2) for num_fds, num_threads in before]
    deadline = time.monotonic() + WAIT_SECONDS
    while any(
        fds > most_fds or threads > most_threads
        for (fds, threads), (most_fds, most_threads) in zip(usage(), most, strict=True)
    ):
        assert time.monotonic() < deadline, f"{usage()}, at first {before}"
        time.sleep(0.1)
    assert not [outcome for outcome in importer.drain(0.05) if isinstance(outcome, PullEnded)]


def test_idle_it_uses_no_time(new_peer: NewPeer) -> None:
    """In one of a few windows: the pull's last work may be booked late, and the clock has ticks of 0.01 s."""
    exporter, importer = new_peer("tcp"), new_peer("tcp")
    assert importer.pull(exporter.export(b"handoff", range(5)), range(5)).status is PullStatus.DONE
    windows = [used_within(0.5, exporter, importer)]
    while min(windows) > 0.025 and len(windows) < 5:
        windows.append(used_within(0.5, exporter, importer))
    assert min(windows) < 0.025, windows


def used_within(seconds: float, *peers: Peer) -> float:
    """Return the processor time that the busiest of them uses meanwhile."""
    before = [psutil.Process(peer.pid).cpu_times() for peer in peers]
    time.sleep(seconds)
    after = [psutil.Process(peer.pid).cpu_times() for peer in peers]
    return max(now.user + now.system - then.user - then.system for now, then in zip(after, before, strict=True))

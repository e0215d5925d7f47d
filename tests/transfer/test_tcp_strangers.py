"""What the exporter's port does with bytes that no importer of ours would send."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import PullEnded, PullStatus, RankPull
from tandem.transfer import wire
from tandem.transfer.handshake import ProofFailed, WrongInstance, dial
from tandem.transfer.pages import Pages
from tandem.transfer.self_test import scratch
from tandem.transfer.tcp_exporter import TcpExporter, listen
from tandem.transfer.tcp_importer import TcpImporter
from tandem.transfer.tcp_stream import TcpSettings, split_address
from tandem.transfer.wire import Frame, Hello, Request, Status, Welcome
from tests.transfer.peer import Peer

PAGE_BYTES = 4096
INSTANCE = b"i" * 16
PATIENCE_SECONDS = 30.0  # neither end closes a connection because a busy machine stopped the other for a while
NOISE = random.Random(1).randbytes(200)


def settings(
    key: bytes | None = None,
    max_serving_connections: int = 256,
    seconds: float = PATIENCE_SECONDS,
    idle_seconds: float = 2 * PATIENCE_SECONDS,
) -> TcpSettings:
    return TcpSettings(
        connect_seconds=seconds,
        progress_seconds=seconds,
        idle_seconds=idle_seconds,
        connections=2,
        key=key,
        max_serving_connections=max_serving_connections,
    )


@contextlib.contextmanager
def exporting(options: TcpSettings) -> Iterator[TcpExporter]:
    exporter = TcpExporter(listen("127.0.0.1", 0), "127.0.0.1", INSTANCE, options)
    space = scratch(4, PAGE_BYTES)
    space.rows[:] = 7
    exporter.open(b"handoff", 1, b"token", (space.whole,))
    exporter.add(b"handoff", 1, 0, Pages.of(space, range(4)))
    try:
        yield exporter
    finally:
        exporter.close()


def connect(exporter: TcpExporter) -> socket.socket:
    sock = socket.create_connection(split_address(exporter.endpoint.address))
    sock.settimeout(PATIENCE_SECONDS)
    return sock


def greeted(exporter: TcpExporter) -> socket.socket:
    sock = connect(exporter)
    sock.sendall(Hello(INSTANCE, bytes(32)).encode())
    assert Welcome.decode(sock.recv(wire.WELCOME_BYTES, socket.MSG_WAITALL)).status is Status.OK
    return sock


def ask(sock: socket.socket, **changes: object) -> Frame:
    fields = {
        "sequence": 9,
        "handoff_id": b"handoff",
        "attempt": 1,
        "token": b"token",
        "piece_bytes": PAGE_BYTES,
        "ordinals": np.arange(4),
    }
    sock.sendall(Request(**{**fields, **changes}).encode())  # type: ignore[arg-type]
    return Frame.decode(sock.recv(wire.FRAME_BYTES, socket.MSG_WAITALL))


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_well_formed_request_is_answered() -> None:
    with exporting(settings()) as exporter, greeted(exporter) as sock:
        frame = ask(sock)
        assert (frame.status, frame.sequence, frame.length, frame.offset) == (Status.OK, 9, 4 * PAGE_BYTES, 0)
        assert sock.recv(frame.length, socket.MSG_WAITALL) == b"\7" * frame.length


@pytest.mark.parametrize(
    "changes",
    [
        {"handoff_id": b""},
        {"handoff_id": b"h" * 64},
        {"token": b""},
        {"token": b"token2"},
        {"attempt": 2**63},
        {"ordinals": np.array([4])},
        {"ordinals": np.array([0, 2**32 - 1])},
        {"piece_bytes": PAGE_BYTES * 2},
        {"piece_bytes": 0},
        {"piece": 1},
        {"piece": 255},
        {"piece_bytes": PAGE_BYTES // 2},
    ],
)
def test_what_is_not_granted_is_refused_and_the_connection_stays(changes: dict[str, object]) -> None:
    with exporting(settings()) as exporter, greeted(exporter) as sock:
        frame = ask(sock, **changes)
        assert frame.status is Status.REFUSED
        assert 0 < len(sock.recv(frame.length, socket.MSG_WAITALL)) <= wire.MAX_MESSAGE_BYTES
        assert ask(sock).status is Status.OK


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: kv\r\n\r\n" + b" " * 64,
        b"\0" * 4096,
        b"TdKV" + b"\xff" * 52,
        Hello(b"j" * 16, bytes(32)).encode(),
        b"\x16\x03\x01" + NOISE,
    ],
)
def test_garbage_instead_of_a_hello_is_closed(data: bytes) -> None:
    with exporting(settings()) as exporter:
        with connect(exporter) as sock:
            sock.sendall(data)
            with contextlib.suppress(OSError):
                while sock.recv(4096):
                    pass
        with greeted(exporter) as sock:
            assert ask(sock).status is Status.OK


def test_who_means_another_process_is_told_and_closed() -> None:
    with exporting(settings()) as exporter, connect(exporter) as sock:
        sock.sendall(Hello(b"j" * 16, bytes(32)).encode())
        answer = Welcome.decode(sock.recv(wire.WELCOME_BYTES, socket.MSG_WAITALL))
        assert (answer.status, answer.instance_id) == (Status.WRONG_INSTANCE, INSTANCE)
        assert is_closed(sock)


@pytest.mark.parametrize(
    "head",
    [
        NOISE[: wire.REQUEST_BYTES],
        struct.pack("<4sBBHIIQQ", b"TdKV", 7, 5, 1, 1, 0, 1, PAGE_BYTES),  # nothing asked for
        struct.pack("<4sBBHIIQQ", b"TdKV", 7, 5, 1, 1, wire.MAX_ORDINALS + 1, 1, PAGE_BYTES),
        struct.pack("<4sBBHIIQQ", b"TdKV", 7, 5, 1, 1, 2**32 - 1, 1, PAGE_BYTES),
        struct.pack("<4sBBHIIQQ", b"TdKV", 65, 5, 1, 1, 1, 1, PAGE_BYTES),
        struct.pack("<4sBBHIIQQ", b"TdKV", 7, 255, 1, 1, 1, 1, PAGE_BYTES),
        struct.pack("<4sBBHIIQQ", b"TdKV", 7, 5, 2, 1, 1, 1, PAGE_BYTES),  # another version
    ],
)
def test_a_request_over_the_limits_is_closed(head: bytes) -> None:
    with exporting(settings()) as exporter:
        with greeted(exporter) as sock:
            sock.sendall(head)
            assert is_closed(sock)
        with greeted(exporter) as sock:
            assert ask(sock).status is Status.OK


@pytest.mark.parametrize("sent", [0, 10, wire.HELLO_BYTES - 1, wire.HELLO_BYTES + 5])
def test_who_falls_silent_is_closed(sent: int) -> None:
    with exporting(settings(seconds=0.5)) as exporter, connect(exporter) as sock:
        with contextlib.suppress(ConnectionError):  # who was silent before this already is closed here
            sock.sendall((Hello(INSTANCE, bytes(32)).encode() + b"TdKVxxxx")[:sent])
            if sent > wire.HELLO_BYTES:
                sock.recv(wire.WELCOME_BYTES, socket.MSG_WAITALL)
        assert is_closed(sock)


def test_who_idles_is_closed_in_the_end() -> None:
    with exporting(settings(idle_seconds=1.0)) as exporter:
        start = time.monotonic()
        with greeted(exporter) as sock:
            assert is_closed(sock)
        assert time.monotonic() - start > 1.9


def test_the_longest_idle_connection_makes_room() -> None:
    with exporting(settings(max_serving_connections=3)) as exporter:
        crowd = [greeted(exporter) for _ in range(3)]
        assert ask(crowd[0]).status is Status.OK  # so the second is the one that idles longest
        crowd[0].recv(4 * PAGE_BYTES, socket.MSG_WAITALL)
        with greeted(exporter) as sock:
            assert ask(sock).status is Status.OK
            assert is_closed(crowd[1])
            assert ask(crowd[2]).status is Status.OK
        for other in crowd:
            other.close()


def test_random_bytes_change_nothing() -> None:
    chooser = random.Random(5)
    with exporting(settings()) as exporter:
        num_threads = psutil.Process().num_threads()
        for _ in range(100):
            with connect(exporter) as sock, contextlib.suppress(OSError):
                if chooser.random() < 0.7:
                    sock.sendall(Hello(INSTANCE, bytes(32)).encode())
                sock.sendall(chooser.randbytes(chooser.randint(0, 300)))
        with greeted(exporter) as sock:
            assert ask(sock).status is Status.OK
        deadline = time.monotonic() + PATIENCE_SECONDS / 2
        while psutil.Process().num_threads() > num_threads and time.monotonic() < deadline:
            time.sleep(0.05)
        assert psutil.Process().num_threads() <= num_threads


# ---- a shared key ------------------------------------------------------------------------------------------------


def test_the_same_key_on_both_ends() -> None:
    with exporting(settings(key=b"k" * 32)) as exporter:
        dial(exporter.endpoint.address, INSTANCE, settings(key=b"k" * 32)).close()


@pytest.mark.parametrize(
    ("exporter_key", "importer_key"), [(b"k" * 32, None), (None, b"k" * 32), (b"k" * 32, b"l" * 32)]
)
def test_different_keys_do_not_connect(exporter_key: bytes | None, importer_key: bytes | None) -> None:
    with exporting(settings(key=exporter_key)) as exporter, pytest.raises((ProofFailed, OSError)):
        dial(exporter.endpoint.address, INSTANCE, settings(key=importer_key))


def test_a_request_without_proof_is_not_answered() -> None:
    with exporting(settings(key=b"k" * 32)) as exporter, greeted(exporter) as sock:
        request = Request(
            sequence=1,
            handoff_id=b"handoff",
            attempt=1,
            token=b"token",
            piece_bytes=PAGE_BYTES,
            ordinals=np.arange(4),
        )
        sock.sendall(request.encode())
        assert is_closed(sock)


def test_an_exporter_that_proves_nothing_is_not_pulled_from() -> None:
    """It answers the challenge with what the importer said: a reflection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reflect() -> None:
            sock, _ = listener.accept()
            with sock:
                hello = Hello.decode(sock.recv(wire.HELLO_BYTES, socket.MSG_WAITALL))
                sock.sendall(Welcome(Status.OK, True, INSTANCE, hello.nonce).encode())
                sock.sendall(sock.recv(wire.PROOF_BYTES, socket.MSG_WAITALL))

        thread = threading.Thread(target=reflect)
        thread.start()
        with pytest.raises(ProofFailed):
            dial(f"127.0.0.1:{listener.getsockname()[1]}", INSTANCE, settings(key=b"k" * 32))
        thread.join()


def test_another_process_on_the_port_is_noticed() -> None:
    with exporting(settings()) as exporter, pytest.raises(WrongInstance):
        dial(exporter.endpoint.address, b"j" * 16, settings())


# ---- an exporter that lies to an importer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        Frame(1, Status.OK, wire.MAX_FRAME_BYTES, 0).encode(),  # more than was asked for
        Frame(1, Status.OK, 0, 0).encode(),
        Frame(1, Status.OK, PAGE_BYTES, PAGE_BYTES).encode(),  # not the next
        Frame(2, Status.OK, PAGE_BYTES, 0).encode(),  # of another request
        Frame(1, Status.REFUSED, wire.MAX_MESSAGE_BYTES + 1, 0).encode(),
        b"TdKV" + bytes(4) + b"\x09" + bytes(55),
        NOISE,
    ],
)
def test_a_lying_exporter_writes_nothing_into_the_pool(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def lie() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(wire.HELLO_BYTES, socket.MSG_WAITALL)
                sock.sendall(Welcome(Status.OK, False, INSTANCE, bytes(32)).encode())
                sock.recv(wire.REQUEST_BYTES, socket.MSG_WAITALL)
                sock.sendall(answer + b"\xff" * PAGE_BYTES)

        thread = threading.Thread(target=lie)
        thread.start()
        space = scratch(2, PAGE_BYTES)
        importer = TcpImporter(space, settings())
        outcomes: queue.Queue[PullEnded] = queue.Queue()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        endpoint = RankEndpoint(transport="tcp", address=address, instance_id=INSTANCE)
        pull = RankPull(
            ticket=1,
            endpoint=endpoint,
            handoff_id=b"handoff",
            attempt=1,
            token=b"token",
            ordinals=(0, 1),
            checksums=bytes(16),
            remote_pages=b"",
            pages=(0, 1),
        )
        importer.pull(pull, outcomes.put)
        ended = outcomes.get(timeout=PATIENCE_SECONDS / 2)
        assert (ended.status, ended.good_ordinals) == (PullStatus.FAILED, ())
        assert not space.rows.any()
        importer.close()
        thread.join()


def test_the_port_is_on_the_given_address_only() -> None:
    peer = Peer("tcp")
    try:
        listening = [
            connection.laddr.ip
            for connection in psutil.Process(peer.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]
    finally:
        peer.close()

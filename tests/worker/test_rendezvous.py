"""Ranks on other hosts come to rank 0: who proves that he belongs here gets in, and nobody else disturbs."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.config import ParallelConfig
from tandem.errors import ConfigError, Unavailable
from tandem.worker import rendezvous

KEY, OTHER_KEY = b"k" * 16, b"o" * 16


class Dialing(threading.Thread):
    def __init__(self, address: str, rank: int, key: bytes, seconds: float = 10.0) -> None:
        super().__init__()
        self._arguments = (address, rank, key, seconds)
        self.connection: socket.socket | None = None
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            self.connection = rendezvous.dial(*self._arguments)
        except Unavailable as error:
            self.error = error.message


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with rendezvous.listen("127.0.0.1:0") as listener:
        yield listener


def address_of(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_ranks_come_in_any_order_and_strangers_do_not_count(listener: socket.socket) -> None:
    address = address_of(listener)
    host, port = rendezvous.split_address(address)
    garbage = socket.create_connection((host, port))
    garbage.sendall(os.urandom(100))
    scanner = socket.create_connection((host, port))
    scanner.close()
    impostor = Dialing(address, 2, OTHER_KEY)
    with ThreadPoolExecutor(1) as leader:
        accepting = leader.submit(rendezvous.accept, listener, range(2, 4), KEY, 20.0)
        impostor.join()  # nobody is answered any more once all ranks are found
        third = Dialing(address, 3, KEY)
        second = Dialing(address, 2, KEY)
        found = accepting.result()
    for dialing in (third, second):
        dialing.join()
    assert sorted(found) == [2, 3]
    assert "token is another one" in impostor.error
    for dialing, rank in ((second, 2), (third, 3)):
        assert dialing.connection is not None
        dialing.connection.sendall(b"hello")
        assert found[rank][0].recv(5) == b"hello"
        dialing.connection.close()
        found[rank][0].close()
    garbage.close()


def test_a_rank_that_is_not_waited_for_is_told(listener: socket.socket) -> None:
    address = address_of(listener)
    with ThreadPoolExecutor(1) as leader:
        accepting = leader.submit(rendezvous.accept, listener, range(1, 2), KEY, 30.0)
        stranger = Dialing(address, 7, KEY)
        stranger.join()
        rank = Dialing(address, 1, KEY)
        assert list(accepting.result()) == [1]
    rank.join()
    assert "does not want rank 7" in stranger.error


def test_a_rank_that_does_not_come_is_told(listener: socket.socket) -> None:
    with pytest.raises(Unavailable, match=r"ranks \[1\] have not come within 0.3 s"):
        rendezvous.accept(listener, range(1, 2), KEY, 0.3)


def test_a_silent_stranger_holds_up_nobody_for_long(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "HANDSHAKE_SECONDS", 1.0)
    silent = socket.create_connection(rendezvous.split_address(address_of(listener)))
    time.sleep(0.05)
    rank = Dialing(address_of(listener), 1, KEY)
    assert list(rendezvous.accept(listener, range(1, 2), KEY, 20.0)) == [1]
    rank.join()
    silent.close()


def test_rank_0_is_waited_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    early = Dialing(address, 1, KEY)
    time.sleep(0.3)
    with rendezvous.listen(address) as listener:
        assert list(rendezvous.accept(listener, range(1, 2), KEY, 20.0)) == [1]
    early.join()
    assert early.connection is not None
    with pytest.raises(Unavailable, match="was not reached"):
        rendezvous.dial(address, 1, KEY, 0.2)


def test_the_secret_is_a_file_with_enough_in_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"parallel\.token_file"):
        rendezvous.rank_key(ParallelConfig(token_file=str(path)))
    path.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match="holds 5 bytes, 16 are the least"):
        rendezvous.rank_key(ParallelConfig(token_file=str(path)))
    path.write_bytes(KEY + b"\n")
    assert rendezvous.rank_key(ParallelConfig(token_file=str(path))) == KEY

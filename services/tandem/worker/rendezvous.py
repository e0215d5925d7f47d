"""How ranks on other hosts find rank 0: they dial it, and each side proves that it knows the worker's rank token.

    follower: magic, rank, nonce        leader: nonce, proof        follower: proof        leader: 1

All sizes are fixed, so a stranger can send 44 bytes and hold one connection for a moment. The proofs cover both
nonces and the rank. Nothing is encrypted: parallel.trusted_network says that nobody listens in.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tandem.config import ParallelConfig
from tandem.errors import ConfigError, Unavailable

HANDSHAKE_SECONDS = 2.0
RETRY_SECONDS = 0.2
KEY_BYTES_MIN = 16
_MAGIC = b"TdRank\x00\x01"
_HELLO = struct.Struct("<8sI32s")
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_logger = logging.getLogger(__name__)


def rank_key(config: ParallelConfig) -> bytes:
    """Read the secret that a worker's ranks share. Raises ConfigError."""
    try:
        key = Path(config.token_file).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"parallel.token_file: {error}") from error
    if len(key) < KEY_BYTES_MIN:
        raise ConfigError(f"parallel.token_file holds {len(key)} bytes, {KEY_BYTES_MIN} are the least")
    return key


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def listen(address: str) -> socket.socket:
    """Listen for ranks. Raises ConfigError."""
    host, port = split_address(address)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"parallel.rendezvous: cannot listen at {address}: {error}") from error


def accept(listener: socket.socket, ranks: range, key: bytes, seconds: float) -> dict[int, tuple[socket.socket, str]]:
    """Wait for these ranks; return a connection of each, and where it comes from. Raises Unavailable.

    Who cannot prove that it is one of them is sent away; so is a second one of a rank.
    """
    found: dict[int, tuple[socket.socket, str]] = {}
    deadline = time.monotonic() + seconds
    while missing := [rank for rank in ranks if rank not in found]:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, peer = listener.accept()
        except TimeoutError:
            raise Unavailable(f"ranks {missing} have not come within {seconds:g} s") from None
        where = f"{peer[0]}:{peer[1]}"
        try:
            rank = _welcome(connection, missing, key)
        except (OSError, ValueError, struct.error) as error:
            _logger.warning("somebody at %s is no rank of this worker: %s", where, error)
            connection.close()
            continue
        found[rank] = (_tuned(connection), where)
    return found


def dial(address: str, rank: int, key: bytes, seconds: float) -> socket.socket:
    """Connect to rank 0, which may not be there yet. Raises Unavailable."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _tuned(_introduce(socket.create_connection(split_address(address), HANDSHAKE_SECONDS), rank, key))
        except ValueError as error:
            raise Unavailable(f"rank 0 at {address}: {error}") from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Unavailable(f"rank 0 was not reached at {address} within {seconds:g} s: {error}") from error
        time.sleep(RETRY_SECONDS)


def _welcome(connection: socket.socket, missing: list[int], key: bytes) -> int:
    with _closed_on_error(connection):
        connection.settimeout(HANDSHAKE_SECONDS)
        magic, rank, theirs = _HELLO.unpack(_read(connection, _HELLO.size))
        if magic != _MAGIC:
            raise ValueError("it speaks something else")
        ours = secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(ours + _proof(key, b"leader", rank, theirs, ours))
        proof = _read(connection, _PROOF_BYTES)
        if not hmac.compare_digest(proof, _proof(key, b"follower", rank, theirs, ours)):
            raise ValueError("its rank token is another one")
        if rank not in missing:
            raise ValueError(f"rank {rank} is not waited for")
        connection.sendall(b"\x01")
        return int(rank)


def _introduce(connection: socket.socket, rank: int, key: bytes) -> socket.socket:
    with _closed_on_error(connection):
        ours = secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(_HELLO.pack(_MAGIC, rank, ours))
        theirs, proof = _read(connection, _NONCE_BYTES), _read(connection, _PROOF_BYTES)
        if not hmac.compare_digest(proof, _proof(key, b"leader", rank, ours, theirs)):
            raise ValueError("its rank token is another one")
        connection.sendall(_proof(key, b"follower", rank, ours, theirs))
        try:
            _read(connection, 1)
        except ConnectionError:
            raise ValueError(f"it does not want rank {rank}, or knows another rank token") from None
        return connection


def _proof(key: bytes, role: bytes, rank: int, follower_nonce: bytes, leader_nonce: bytes) -> bytes:
    return hmac.new(key, role + struct.pack("<I", rank) + follower_nonce + leader_nonce, hashlib.sha256).digest()


def _read(connection: socket.socket, size: int) -> bytes:
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("it closed the connection")
        data += part
    return data


def _tuned(connection: socket.socket) -> socket.socket:
    """Small messages at once; a host that is gone is noticed in seconds."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
    return connection


@contextlib.contextmanager
def _closed_on_error(connection: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise

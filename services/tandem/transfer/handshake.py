"""What the two ends of a new KV connection say first: TLS, who is meant, who answers, and proof of a shared key."""

from __future__ import annotations

import hashlib
import hmac
import os

from tandem.errors import TransportError
from tandem.transfer import wire
from tandem.transfer.tcp_stream import Stream, TcpSettings, connect
from tandem.transfer.wire import Hello, ProtocolError, Status, Welcome


class WrongInstance(TransportError):
    """Another process listens on the address now: the one that was meant is gone."""


class ProofFailed(TransportError):
    """The two ends do not share a key."""


def dial(address: str, instance_id: bytes, settings: TcpSettings) -> Stream:
    """Connect to one certain process. Raises OSError or TransportError."""
    stream = connect(address, settings.connect_seconds, settings.progress_seconds)
    try:
        if settings.tls is not None:
            stream.secure(settings.tls, is_listener=False, seconds=settings.connect_seconds)
        _greet(stream, instance_id, settings)
    except BaseException:
        stream.close()
        raise
    return stream


def _greet(stream: Stream, instance_id: bytes, settings: TcpSettings) -> None:
    nonce = os.urandom(wire.NONCE_BYTES)
    stream.write(Hello(instance_id, nonce).encode())
    welcome = Welcome.decode(stream.read(wire.WELCOME_BYTES, settings.connect_seconds))
    if welcome.status is not Status.OK or welcome.instance_id != instance_id:
        raise WrongInstance("another process listens on this address now")
    if welcome.wants_proof != (settings.key is not None):
        raise ProofFailed("one end has a shared key and the other has none")
    if settings.key is None:
        return
    stream.write(_proof(settings.key, b"importer", instance_id, nonce, welcome.nonce))
    answer = stream.read(wire.PROOF_BYTES, settings.connect_seconds)
    if not hmac.compare_digest(answer, _proof(settings.key, b"exporter", instance_id, nonce, welcome.nonce)):
        raise ProofFailed("the exporter does not have the shared key")


def welcome(stream: Stream, instance_id: bytes, settings: TcpSettings) -> None:
    """Greet an importer. Raises TransportError or OSError: then the connection is to be closed."""
    if settings.tls is not None:
        stream.secure(settings.tls, is_listener=True, seconds=settings.connect_seconds)
    hello = Hello.decode(stream.read(wire.HELLO_BYTES, settings.connect_seconds))
    nonce = os.urandom(wire.NONCE_BYTES)
    status = Status.OK if hello.instance_id == instance_id else Status.WRONG_INSTANCE
    stream.write(Welcome(status, settings.key is not None, instance_id, nonce).encode())
    if status is not Status.OK:
        raise ProtocolError("the importer means another process")
    if settings.key is None:
        return
    answer = stream.read(wire.PROOF_BYTES, settings.connect_seconds)
    if not hmac.compare_digest(answer, _proof(settings.key, b"importer", instance_id, hello.nonce, nonce)):
        raise ProofFailed("the importer does not have the shared key")
    stream.write(_proof(settings.key, b"exporter", instance_id, hello.nonce, nonce))


def _proof(key: bytes, role: bytes, instance_id: bytes, importer_nonce: bytes, exporter_nonce: bytes) -> bytes:
    return hmac.new(key, role + instance_id + importer_nonce + exporter_nonce, hashlib.sha256).digest()

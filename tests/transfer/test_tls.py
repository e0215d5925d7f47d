"""The KV port between pods with certificates: who is let in, in which words others are not, and a change of them."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tandem.certificates import between_pods
from tandem.config import TlsConfig
from tandem.core.messages.transfer import PullStatus
from tandem.errors import TransportError
from tandem.transfer.handshake import dial
from tandem.transfer.tcp_exporter import TcpExporter, listen
from tandem.transfer.tcp_stream import Stream, TcpSettings, split_address
from tandem.transfer.tls import PeerTls
from tests.certificates import PEER_NAME, Authority
from tests.transfer.conftest import NewPeer
from tests.transfer.test_tcp_strangers import INSTANCE, PATIENCE_SECONDS, exporting


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


def settings(tls: TlsConfig, seconds: float = PATIENCE_SECONDS) -> TcpSettings:
    source = between_pods(tls)
    return timed(seconds, PeerTls(source) if source is not None else None)


def timed(seconds: float, tls: PeerTls | None) -> TcpSettings:
    return TcpSettings(connect_seconds=seconds, progress_seconds=seconds, idle_seconds=seconds, connections=2, tls=tls)


def greet(exporter: TcpExporter, options: TcpSettings) -> str:
    """Connect, and return why that failed, "" if it did not."""
    try:
        dial(exporter.endpoint.address, INSTANCE, options).close()
    except (OSError, TransportError) as error:
        return str(error)
    return ""


def stranger(authority: Authority, name: str, ca_file: Path) -> TcpSettings:
    """Return the settings of somebody whose own pair would not pass our check at the start."""
    chain, key = authority.issue(name)

    class Stranger(PeerTls):
        def __init__(self) -> None:
            self._context = ssl.create_default_context(cafile=str(ca_file))
            for path, data in ((ca_file.parent / "s.crt", chain), (ca_file.parent / "s.key", key)):
                path.write_bytes(data)
            self._context.load_cert_chain(ca_file.parent / "s.crt", ca_file.parent / "s.key")

        def _newest(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
            return self._context, self._context

    made = settings(authority.pod("unused"))
    assert made.tls is not None
    tls = Stranger()
    tls._source = made.tls._source
    return timed(PATIENCE_SECONDS, tls)


def test_pods_meet(authority: Authority) -> None:
    with exporting(settings(authority.pod("a"))) as exporter:
        assert greet(exporter, settings(authority.pod("b"))) == ""


def test_strangers_are_refused_on_both_sides(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.transfer.tcp_exporter._TOLD_SECONDS", 0.0)
    other = Authority(tmp_path / "other")
    with exporting(settings(authority.pod())) as exporter, caplog.at_level(logging.WARNING):
        assert greet(exporter, settings(TlsConfig())) != ""  # plaintext
        assert "certificate is refused: self-signed certificate in certificate chain" in greet(
            exporter, settings(other.pod())
        )
        # The alert says UNKNOWN_CA; a reset that overtakes it, nothing.
        assert "the other end ended TLS" in greet(exporter, stranger(other, PEER_NAME, authority.ca_file))
        assert greet(exporter, stranger(authority, "somebody", authority.ca_file)) != ""
        assert greet(exporter, settings(authority.pod("again"))) == ""
    told = "\n".join(caplog.messages)
    assert "a KV connection from 127.0.0.1 is refused: no TLS with the other end: WRONG_VERSION_NUMBER" in told
    assert "certificate is refused: unable to get local issuer certificate" in told
    assert f"certificate does not carry the DNS name {PEER_NAME}" in told


def test_a_stranger_who_tries_again_fills_no_log(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.transfer.tcp_exporter._TOLD_SECONDS", 600.0)  # longer than this may take
    with exporting(settings(authority.pod())) as exporter:
        for _ in range(20):
            assert greet(exporter, settings(TlsConfig())) != ""
    assert len(caplog.messages) == 1


def test_an_exporter_with_another_name_is_not_read_from(authority: Authority) -> None:
    chain, key = authority.write("named", "somebody", PEER_NAME)
    tls = TlsConfig(
        peer_certificate_file=str(chain),
        peer_key_file=str(key),
        peer_ca_file=str(authority.ca_file),
        peer_name="somebody",
    )
    narrow = authority.pod("narrow")  # for the usual name only
    with exporting(settings(narrow)) as exporter:
        assert "certificate is refused: Hostname mismatch" in greet(exporter, settings(tls))


def test_who_says_nothing_is_dropped_within_the_connect_time(authority: Authority) -> None:
    with exporting(settings(authority.pod(), seconds=1.0)) as exporter:
        began = time.monotonic()
        with socket.create_connection(split_address(exporter.endpoint.address)) as sock:
            sock.settimeout(PATIENCE_SECONDS)
            assert sock.recv(1) == b""
        assert time.monotonic() - began > 0.9


def test_an_exporter_that_says_nothing_fails_within_the_connect_time(authority: Authority) -> None:
    with listen("127.0.0.1", 0) as silent:
        began = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            dial(f"127.0.0.1:{silent.getsockname()[1]}", INSTANCE, settings(authority.pod(), seconds=1.0))
        assert time.monotonic() - began < PATIENCE_SECONDS / 2


def test_a_cut_connection_never_turns_to_plaintext(authority: Authority) -> None:
    """SSLSocket.shutdown would: what it reads after that are the peer's encrypted bytes, as if they were pages."""
    tls = settings(authority.pod()).tls
    assert tls is not None
    with listen("127.0.0.1", 0) as listener:
        sock = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    stream = Stream(sock, PATIENCE_SECONDS)
    peer = tls.wrap(accepted, is_listener=True, seconds=PATIENCE_SECONDS)
    with contextlib.closing(stream), peer.socket:
        thread = threading.Thread(target=peer.shake_hands)
        thread.start()
        stream.secure(tls, is_listener=False, seconds=PATIENCE_SECONDS)
        thread.join()
        peer.write(b"x" * 1000)
        assert stream.wait_readable(PATIENCE_SECONDS)
        stream.shut()
        got = b""
        with contextlib.suppress(OSError):
            for _ in range(2000):
                got += stream.read(1)
        assert got == b"x" * len(got)
        assert len(got) <= 1000


def test_a_change_reaches_new_connections(authority: Authority, new_peer: NewPeer) -> None:
    tls = authority.pod(reload_seconds=0.05)
    exporter, importer = new_peer("tcp", tls=tls, seed=1), new_peer("tcp", tls=tls, seed=2)
    shared = exporter.export(b"handoff", range(8))
    assert importer.pull(shared, range(8)).status is PullStatus.DONE
    successor = Authority(Path(tls.peer_ca_file).parent / "successor")
    chain, key = successor.issue(PEER_NAME)
    for path, data in ((tls.peer_certificate_file, chain), (tls.peer_key_file, key), (tls.peer_ca_file, successor.ca)):
        Path(path).write_bytes(data)
    third = new_peer("tcp", tls=tls, seed=3)  # knows the new authority only
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (ended := third.pull(shared, range(8))).status is not PullStatus.DONE:  # until the exporter knows it as well
        assert time.monotonic() < deadline, ended.message
        time.sleep(0.05)
    assert importer.pull(shared, range(8, 16)).status is PullStatus.DONE  # over the connection that there is
    assert np.array_equal(third.rows[:8], exporter.rows[:8])

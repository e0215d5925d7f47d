"""Certificate files: what is refused, in which words, and what a change of the files does."""

from __future__ import annotations

import datetime
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tandem.certificates import CertificateSource, between_pods, carries_name, client_facing
from tandem.config import TlsConfig
from tandem.errors import ConfigError
from tests.certificates import PEER_NAME, Authority

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


def peers(tls: TlsConfig) -> CertificateSource:
    source = between_pods(tls)
    assert source is not None
    return source


def test_nothing_is_plaintext() -> None:
    assert between_pods(TlsConfig()) is None
    assert client_facing(TlsConfig()) is None


def test_a_good_pair_is_read_with_its_end(authority: Authority) -> None:
    now = time.time()
    for source in (peers(authority.pod()), client_facing(authority.gateway())):
        assert source is not None
        assert source.current.chain.startswith(b"-----BEGIN CERTIFICATE")
        assert source.current.expires > now + 86400
        assert "PRIVATE" not in repr(source.current)


def test_a_client_authority_need_not_be_the_gateways_own(authority: Authority, tmp_path: Path) -> None:
    clients = Authority(tmp_path / "clients")
    source = client_facing(replace(authority.gateway(), client_ca_file=str(clients.ca_file)))
    assert source is not None
    assert source.current.authorities == clients.ca


def test_peers_of_another_authority_are_told_from_ours(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"tls\.peer_certificate_file .* would be refused with tls\.peer_ca_file"):
        between_pods(replace(authority.pod(), peer_ca_file=str(other.ca_file)))


def test_another_name(authority: Authority) -> None:
    with pytest.raises(ConfigError, match=f"not valid for '{PEER_NAME}'"):
        between_pods(authority.pod(name="somebody"))


def test_a_wildcard_is_not_the_name(authority: Authority) -> None:
    tls = replace(authority.pod(name="*.example.org"), peer_name="pods.example.org")
    with pytest.raises(ConfigError, match=r"does not carry the DNS name pods\.example\.org"):
        between_pods(tls)


def test_an_expired_one(authority: Authority) -> None:
    chain, key = authority.write("old", PEER_NAME, not_after=YESTERDAY)
    with pytest.raises(ConfigError, match=r"old\.crt would be refused.*expired"):
        between_pods(replace(authority.pod(), peer_certificate_file=str(chain), peer_key_file=str(key)))
    with pytest.raises(ConfigError, match=r"old\.crt would be refused: .*expired"):
        client_facing(TlsConfig(certificate_file=str(chain), key_file=str(key)))


def test_the_key_of_another(authority: Authority) -> None:
    _, key = authority.write("second", PEER_NAME)
    with pytest.raises(ConfigError, match=r"tls\.peer_key_file .*second\.key is not the key of tls\.peer_certificate"):
        between_pods(replace(authority.pod(), peer_key_file=str(key)))


def test_an_encrypted_key_is_refused_without_a_question(authority: Authority) -> None:
    tls = authority.pod()
    key = serialization.load_pem_private_key(Path(tls.peer_key_file).read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    Path(tls.peer_key_file).write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    )
    with pytest.raises(ConfigError, match=r"tls\.peer_key_file .*needs a password"):
        between_pods(tls)


@pytest.mark.parametrize("setting", ["peer_certificate_file", "peer_key_file", "peer_ca_file"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "large"])
def test_the_file_that_is_broken_is_named(authority: Authority, setting: str, damage: str) -> None:
    tls = authority.pod()
    path = Path(getattr(tls, setting))
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        bad = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\xff\x00" * 99, "large": b" " * (2 << 20)}
        path.write_bytes(bad[damage])
    with pytest.raises(ConfigError, match=rf"tls\.{setting} {path}: "):
        between_pods(tls)


# ---- a change -----------------------------------------------------------------------------------------------------


def test_a_new_pair_is_taken_over_once(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    source = peers(authority.pod())
    first = source.current
    source.look()
    assert source.current is first
    authority.pod()
    with caplog.at_level(logging.INFO):
        source.look()
        second = source.current
        source.look()
    assert second.chain != first.chain
    assert source.current is second
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_bad_pair_keeps_the_old_and_is_told_once(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    tls = authority.pod()
    source = peers(tls)
    first = source.current
    key = Path(tls.peer_key_file)
    whole = key.read_bytes()
    key.write_bytes(whole[:50])
    source.look()
    source.look()
    assert source.current is first
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(key) in caplog.text and "stays in use" in caplog.text
    assert whole.decode() not in caplog.text
    key.unlink()
    source.look()
    source.look()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    chain, key_bytes = authority.issue(PEER_NAME)
    key.write_bytes(key_bytes)  # the new key is there before the new certificate
    source.look()
    assert source.current is first
    Path(tls.peer_certificate_file).write_bytes(chain)
    source.look()
    assert source.current.chain == chain


def test_the_files_are_followed(authority: Authority) -> None:
    source = peers(authority.pod(reload_seconds=0.02))
    first = source.current
    source.start()
    try:
        authority.pod()
        deadline = time.monotonic() + 30
        while source.current is first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        source.close()


def test_one_that_expires_in_use_is_told_once(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1.5)
    chain, key = authority.write("short", PEER_NAME, not_after=soon)
    source = peers(replace(authority.pod(), peer_certificate_file=str(chain), peer_key_file=str(key)))
    time.sleep(2.0)
    source.look()
    source.look()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert f"{chain} has expired" in caplog.text


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("tandem",), True), (("a", "TANDEM"), True), (("tandem.svc",), False), (("*",), False), ((), False)],
)
def test_names(names: tuple[str, ...], expected: bool) -> None:
    assert carries_name({"subjectAltName": tuple(("DNS", name) for name in names)}, "tandem") is expected


def test_a_name_that_is_no_dns_name_does_not_count() -> None:
    assert not carries_name({"subjectAltName": (("email", "tandem"), ("URI", "tandem"))}, "tandem")
    assert not carries_name(None, "tandem")

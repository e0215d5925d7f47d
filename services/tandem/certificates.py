"""The certificate files of a process: read as one, checked, and looked at again for a change.

Here and nowhere else such files are read. What is made of them is elsewhere: credentials of gRPC (`rpc.tls`), contexts
of the KV data plane (`transfer.tls`). A pair is checked by a handshake with itself, in memory: what gets through would
be accepted by a peer with the same authorities, so an expired, foreign or misnamed certificate is found here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tandem.config import TlsConfig
from tandem.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
_HANDSHAKE_TURNS = 8
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pem:
    """Contents of the files, b"" for one that there is not. `expires`: of the certificate, seconds since 1970."""

    chain: bytes = b""
    key: bytes = field(default=b"", repr=False)
    authorities: bytes = b""
    expires: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    """Paths, "" for a file that there is not. `peer_name`: what peers' certificates must carry; "" is no peers'."""

    chain: str
    key: str
    authorities: str
    peer_name: str = ""

    @property
    def labels(self) -> tuple[str, str, str]:
        """The names of the settings that the three paths come from, with the paths: for messages."""
        if self.peer_name:
            names = ("tls.peer_certificate_file", "tls.peer_key_file", "tls.peer_ca_file")
        else:
            names = ("tls.certificate_file", "tls.key_file", "tls.client_ca_file")
        chain, key, authorities = zip(names, (self.chain, self.key, self.authorities), strict=True)
        return f"{chain[0]} {chain[1]}", f"{key[0]} {key[1]}", f"{authorities[0]} {authorities[1]}"


class CertificateSource:
    """The newest good contents of the files. `current` from any thread; `start` makes it follow the files."""

    def __init__(self, files: CertificateFiles, reload_seconds: float) -> None:
        """Read them. Raises ConfigError, which names the file, if they cannot be used."""
        self.files = files
        self._reload_seconds = reload_seconds
        self._seen = _read_all(files)
        self._current = check(files, self._seen)
        self._fault = ""
        self._told_expired = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def current(self) -> Pem:
        """Another object after a change, and only then."""
        return self._current

    def start(self) -> None:
        """Look at the files every `reload_seconds`, until `close`."""
        self._thread = threading.Thread(target=self._follow, name="certificates", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking. Harmless before `start`."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Take a changed and good set of files over; of one that is not good, say so once and keep the old."""
        try:
            seen = _read_all(self.files)
            if seen == self._seen:
                self._fault = ""
                self._warn_expired()
                return
            self._seen = seen
            self._current = check(self.files, seen)
        except ConfigError as error:
            if error.message != self._fault:
                self._fault = error.message
                _logger.warning("the certificate that was read before stays in use: %s", error.message)
            return
        self._fault, self._told_expired = "", False
        _logger.info("%s was read again, valid until %s", self.files.labels[0], _day(self._current.expires))

    def _warn_expired(self) -> None:
        if time.time() > self._current.expires and not self._told_expired:
            self._told_expired = True
            _logger.error("%s has expired on %s", self.files.labels[0], _day(self._current.expires))

    def _follow(self) -> None:
        while not self._closing.wait(self._reload_seconds):
            self.look()


def client_facing(config: TlsConfig) -> CertificateSource | None:
    """Read what a gateway shows to its clients; None for plaintext. Raises ConfigError."""
    if not config.certificate_file:
        return None
    files = CertificateFiles(
        chain=config.certificate_file, key=config.key_file, authorities=config.client_ca_file, peer_name=""
    )
    return CertificateSource(files, config.reload_seconds)


def between_pods(config: TlsConfig) -> CertificateSource | None:
    """Read what pods show to each other; None for plaintext. Raises ConfigError."""
    if not config.peer_certificate_file:
        return None
    files = CertificateFiles(
        chain=config.peer_certificate_file,
        key=config.peer_key_file,
        authorities=config.peer_ca_file,
        peer_name=config.peer_name,
    )
    return CertificateSource(files, config.reload_seconds)


def of_client(ca_file: str, certificate_file: str, key_file: str) -> Pem:
    """Read what a command line client was given, "" for what it was not. Raises ConfigError, in words of its flags."""
    authorities = read_file(f"--tls-ca-file {ca_file}", ca_file)
    if ca_file:
        check_certificates(f"--tls-ca-file {ca_file}", authorities)
    if bool(certificate_file) != bool(key_file):
        raise ConfigError("--tls-certificate-file, --tls-key-file: one without the other")
    labels = f"--tls-certificate-file {certificate_file}", f"--tls-key-file {key_file}"
    pem = Pem(read_file(labels[0], certificate_file), read_file(labels[1], key_file), authorities)
    if certificate_file:
        check_certificates(labels[0], pem.chain)
        _checked_contexts(*labels, pem, between_peers=False)
    return pem


def read_file(label: str, path: str) -> bytes:
    """Read one file, bounded; `label` names it in the ConfigError that this raises."""
    if not path:
        return b""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{label}: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{label}: larger than {MAX_FILE_BYTES} bytes")
    return data


def check(files: CertificateFiles, contents: tuple[bytes, bytes, bytes]) -> Pem:
    """Return the contents as a Pem that works. Raises ConfigError with the file that does not."""
    pem = Pem(*contents)
    chain_label, key_label, authorities_label = files.labels
    check_certificates(chain_label, pem.chain)
    if files.authorities:
        check_certificates(authorities_label, pem.authorities)
    client, server = _checked_contexts(chain_label, key_label, pem, between_peers=bool(files.peer_name))
    try:
        shown = _shake_hands(client, server, files.peer_name)
    except ssl.SSLCertVerificationError as error:
        where = f" with {authorities_label}" if files.peer_name else ""
        raise ConfigError(f"{chain_label} would be refused{where}: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise ConfigError(f"{chain_label} cannot be used: {error.reason or error}") from error
    if files.peer_name and not carries_name(shown, files.peer_name):
        raise ConfigError(f"{chain_label} does not carry the DNS name {files.peer_name} (tls.peer_name)")
    return Pem(*contents, ssl.cert_time_to_seconds(shown["notAfter"]))


def check_certificates(label: str, data: bytes) -> None:
    """Raise ConfigError unless this is PEM with a certificate in it."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{label}: there is no whole PEM certificate in it") from error


def peer_contexts(pem: Pem) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the contexts of both ends of a mutual TLS 1.3 connection: of who connects, of who listens."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in (client, server):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=pem.authorities.decode("ascii"))
        _load(context, pem.chain, pem.key)
    server.num_tickets = 0  # connections are kept, not resumed
    return client, server


def carries_name(shown: Any, name: str) -> bool:
    """Whether a certificate, as `getpeercert` gives it, has this DNS name; no wildcards."""
    names = [value for kind, value in (shown or {}).get("subjectAltName", ()) if kind == "DNS"]
    return name.lower() in (each.lower() for each in names)


def _read_all(files: CertificateFiles) -> tuple[bytes, bytes, bytes]:
    chain, key, authorities = files.labels
    return read_file(chain, files.chain), read_file(key, files.key), read_file(authorities, files.authorities)


def _checked_contexts(
    chain_label: str, key_label: str, pem: Pem, *, between_peers: bool
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    try:
        if between_peers:
            return peer_contexts(pem)
        client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client.check_hostname = False
        client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        client.load_verify_locations(cadata=pem.chain.decode("ascii"))
        _load(server, pem.chain, pem.key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key_label} is not the key of {chain_label}") from error
        raise ConfigError(f"{key_label}: there is no whole PEM key in it") from error
    except _Encrypted as error:
        raise ConfigError(f"{key_label} needs a password; only keys without one can be used") from error
    return client, server


class _Encrypted(Exception):
    """The key is encrypted. Without this OpenSSL would ask for the password on the terminal."""


def _refuse_password() -> str:
    raise _Encrypted


def _load(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Load a pair from memory: from the files it might be another one than was read. Raises ssl.SSLError."""
    with _as_path(chain) as chain_path, _as_path(key) as key_path:
        context.load_cert_chain(chain_path, key_path, _refuse_password)


@contextlib.contextmanager
def _as_path(data: bytes) -> Iterator[str]:
    """Lend a path to data in memory; `ssl` takes certificates of its own from paths only."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> dict[str, Any]:
    """Connect the two in memory and return the server's certificate. Raises ssl.SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name or None),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(_HANDSHAKE_TURNS):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].getpeercert() or {}


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))

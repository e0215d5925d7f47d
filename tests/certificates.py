"""Certificates for the tests: authorities made on the spot, and the files that a program is given."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme

from tandem.config import TlsConfig

PEER_NAME = "tandem"


class Authority:
    """A certificate authority, and what it writes into a folder."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._authority.cert_pem.bytes())

    @property
    def ca(self) -> bytes:
        return self._authority.cert_pem.bytes()

    def issue(self, *names: str, not_after: datetime.datetime | None = None) -> tuple[bytes, bytes]:
        """Return a new chain and its key."""
        made = self._authority.issue_cert(*names, not_after=not_after)
        return b"".join(pem.bytes() for pem in made.cert_chain_pems), made.private_key_pem.bytes()

    def write(self, label: str, *names: str, not_after: datetime.datetime | None = None) -> tuple[Path, Path]:
        """Write a new pair, over the one that `label` had; return where."""
        chain, key = self.issue(*names, not_after=not_after)
        paths = self._folder / f"{label}.crt", self._folder / f"{label}.key"
        paths[0].write_bytes(chain)
        paths[1].write_bytes(key)
        return paths

    def pod(self, label: str = "pod", name: str = PEER_NAME, reload_seconds: float = 0.1) -> TlsConfig:
        """Return the settings of a pod with a new certificate for `name`."""
        chain, key = self.write(label, name)
        return TlsConfig(
            peer_certificate_file=str(chain),
            peer_key_file=str(key),
            peer_ca_file=str(self.ca_file),
            peer_name=PEER_NAME,
            reload_seconds=reload_seconds,
        )

    def gateway(self, label: str = "gateway", reload_seconds: float = 0.1) -> TlsConfig:
        """Return the settings of a gateway that shows a new certificate for this machine to its clients."""
        chain, key = self.write(label, "127.0.0.1", "localhost")
        return TlsConfig(certificate_file=str(chain), key_file=str(key), reload_seconds=reload_seconds)


def flags(tls: TlsConfig) -> list[str]:
    """Return the settings as command line flags of a program."""
    names = TlsConfig.__dataclass_fields__
    return [f"--tls.{name.replace('_', '-')}={getattr(tls, name)}" for name in names if getattr(tls, name) != ""]

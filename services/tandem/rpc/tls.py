"""TLS of gRPC: credentials of servers and channels out of certificates that may change while they are in use.

New connections use the newest certificates, running ones go on. Not here: reading the files (`tandem.certificates`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc import aio

from tandem.certificates import CertificateSource, Pem
from tandem.errors import PermissionDenied

_PEER_NAMES = "peer_dns"
_TOLD_SECONDS = 10.0  # a stranger who tries again and again fills no log
_logger = logging.getLogger(__name__)


def server_credentials(source: CertificateSource, *, require_client: bool) -> grpc.ServerCredentials:
    """Return the credentials of one server. `require_client`: clients show a certificate of our authorities."""
    given = source.current

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by the library for each connection; None: as before."""
        nonlocal given
        current = source.current
        if current is given:
            return None
        given = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(given),
        changed,  # type: ignore[arg-type] # the stubs do not know that None is an answer
        require_client_authentication=require_client,
    )


class ClientTls:
    """How channels are secured: who the servers must be, and what is shown to them."""

    def __init__(self, current: Callable[[], Pem], server_name: str = "") -> None:
        """`current`: no authorities are the public ones. `server_name`: the servers' name, whatever is dialled."""
        self._current = current
        self._server_name = server_name
        self._pem: Pem | None = None
        self._credentials: grpc.ChannelCredentials

    @classmethod
    def between_pods(cls, source: CertificateSource) -> ClientTls:
        """Return how a pod's channels to other pods are secured."""
        return cls(lambda: source.current, source.files.peer_name)

    def credentials(self) -> grpc.ChannelCredentials:
        """Return those of the newest certificates: another object after a change, and only then."""
        pem = self._current()
        if pem is not self._pem:
            self._pem = pem
            self._credentials = grpc.ssl_channel_credentials(
                pem.authorities or None, pem.key or None, pem.chain or None
            )
        return self._credentials

    @property
    def options(self) -> list[tuple[str, str]]:
        """Channel options that belong to it."""
        return [("grpc.ssl_target_name_override", self._server_name)] if self._server_name else []


class PeerCheck:
    """Lets calls of pods pass: those whose certificate carries the DNS name that all pods' certificates carry."""

    def __init__(self, name: str) -> None:
        self._name = name.lower()
        self._told_at = -_TOLD_SECONDS

    def __call__(self, context: aio.ServicerContext[Any, Any]) -> None:
        """Raise PermissionDenied for anybody else. The library has checked the rest of the certificate already."""
        names = [name.decode(errors="replace") for name in context.auth_context().get(_PEER_NAMES, ())]
        if self._name in (name.lower() for name in names):
            return
        shown = ", ".join(names) or "no DNS name"
        if time.monotonic() - self._told_at >= _TOLD_SECONDS:
            self._told_at = time.monotonic()
            _logger.warning("calls of %s are refused: its certificate is for %s", context.peer(), shown)
        raise PermissionDenied(f"your certificate is for {shown}, not for {self._name}")


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], pem.authorities or None)

"""Client channels to other processes of this system, and why one does not connect."""

from __future__ import annotations

from typing import Any

import grpc
from grpc import aio

from tandem.rpc.options import RECONNECT_SECONDS_MAX, WORKER_MESSAGE_BYTES, client_options
from tandem.rpc.tls import ClientTls

_ASK_SECONDS = 0.5
_ANY_METHOD = "/grpc.health.v1.Health/Check"
# What the library says, and what that means to who reads it.
_MEANINGS = (
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not from the authorities that we know, or is not valid now"),
    ("Hostname Verification Check failed", "its certificate is for another name"),
)
_CLOSED = ("Socket closed", "Connection reset", "GOAWAY", "connection attempt timed out before receiving SETTINGS")


def open_channel(
    address: str,
    *,
    max_message_bytes: int = WORKER_MESSAGE_BYTES,
    tls: ClientTls | None = None,
    connect_seconds: float = RECONNECT_SECONDS_MAX,
) -> aio.Channel:
    """Return a channel to `address` (host:port); it connects with the first call. The caller closes it.

    An attempt to connect that takes longer than `connect_seconds` has failed.
    """
    options = client_options(max_message_bytes, connect_seconds)
    if tls is not None:
        return aio.secure_channel(address, tls.credentials(), options=[*options, *tls.options])
    return aio.insecure_channel(address, options=options)


async def why_not_connected(channel: aio.Channel, *, secure: bool) -> str:
    """Return in words why a channel does not connect, "" if it does or the reason is not known."""
    call: Any = channel.unary_unary(_ANY_METHOD)
    try:
        await call(b"", timeout=_ASK_SECONDS)
    except aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return ""
        return _meaning(error.details() or "", secure)
    return ""


def _meaning(details: str, secure: bool) -> str:
    for sign, meaning in _MEANINGS:
        if sign in details:
            return meaning
    if any(sign in details for sign in _CLOSED):
        if secure:
            return "it closes the connection: it wants a certificate that it trusts, or does not have TLS"
        return "it closes the connection: it may want TLS"
    return details.rpartition("last error: ")[2]

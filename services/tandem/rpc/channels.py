"""Client channels to other processes of this system."""

from __future__ import annotations

import grpc
from grpc import aio

from tandem.rpc.options import WORKER_MESSAGE_BYTES, client_options


def open_channel(
    address: str,
    *,
    max_message_bytes: int = WORKER_MESSAGE_BYTES,
    credentials: grpc.ChannelCredentials | None = None,
) -> aio.Channel:
    """Return a channel to `address` (host:port); it connects with the first call. The caller closes it."""
    options = client_options(max_message_bytes)
    if credentials is not None:
        return aio.secure_channel(address, credentials, options=options)
    return aio.insecure_channel(address, options=options)

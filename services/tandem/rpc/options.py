"""Channel options that clients and servers of this system share, and why they are what they are."""

from __future__ import annotations

from collections.abc import Mapping

GATEWAY_MESSAGE_BYTES = 64 << 20  # a 10 MB prompt must reach the validation that refuses it
WORKER_MESSAGE_BYTES = 256 << 20  # a session frame may carry the prompt logprobs of many requests
KEEPALIVE_SECONDS = 30
KEEPALIVE_TIMEOUT_SECONDS = 10
MIN_PING_INTERVAL_SECONDS = 10  # servers answer faster pings with GOAWAY; grpc's own default of 5 min forbids ours
CONNECTION_AGE_GRACE_SECONDS = 3600
RECONNECT_SECONDS_MIN = 0.1
RECONNECT_SECONDS_MAX = 2.0

Options = list[tuple[str, int | str]]


def _messages(max_message_bytes: int) -> dict[str, int | str]:
    return {
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": max_message_bytes,
        "grpc.keepalive_time_ms": KEEPALIVE_SECONDS * 1000,
        "grpc.keepalive_timeout_ms": KEEPALIVE_TIMEOUT_SECONDS * 1000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }


def server_options(max_message_bytes: int, *, share_port: bool, max_connection_age_seconds: float | None) -> Options:
    """Return the options of a server. `share_port`: several processes may listen on one port (SO_REUSEPORT)."""
    options = _messages(max_message_bytes) | {
        "grpc.http2.min_recv_ping_interval_without_data_ms": MIN_PING_INTERVAL_SECONDS * 1000,
        "grpc.max_concurrent_streams": 16384,
        "grpc.so_reuseport": int(share_port),  # off: a port that is taken must be an error, not shared silently
    }
    if max_connection_age_seconds is not None:
        options["grpc.max_connection_age_ms"] = round(max_connection_age_seconds * 1000)
        options["grpc.max_connection_age_grace_ms"] = CONNECTION_AGE_GRACE_SECONDS * 1000
    return _sorted(options)


def client_options(max_message_bytes: int, connect_seconds: float = RECONNECT_SECONDS_MAX) -> Options:
    """Return the options of a channel to one named process of ours. `connect_seconds`: of one attempt, at most."""
    return _sorted(
        _messages(max_message_bytes)
        | {
            "grpc.initial_reconnect_backoff_ms": round(RECONNECT_SECONDS_MIN * 1000),
            "grpc.min_reconnect_backoff_ms": round(connect_seconds * 1000),  # no backoff, but how long an attempt lasts
            "grpc.max_reconnect_backoff_ms": round(RECONNECT_SECONDS_MAX * 1000),
            "grpc.enable_retries": 0,  # who may be asked again is decided by the caller, not by the library
            "grpc.enable_http_proxy": 0,  # workers are never behind the proxy of the environment
            "grpc.use_local_subchannel_pool": 1,
        }
    )


def _sorted(options: Mapping[str, int | str]) -> Options:
    return sorted(options.items())

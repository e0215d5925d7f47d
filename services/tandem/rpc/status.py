"""The error tree as gRPC statuses and back: the one place that knows which class has which code.

A status carries google.rpc details: ErrorInfo always, RetryInfo where trying again helps, BadRequest where a field is
at fault. Servicers raise members of the tree; `tandem.rpc.interceptor` ends the call. Not here: HTTP statuses.
"""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from tandem import errors

DOMAIN = "tandem"
DEFAULT_RETRY_SECONDS = 1.0
MAX_MESSAGE_CHARS = 2048  # a status travels in HTTP/2 headers, which peers cut at 8 KiB
_DETAILS_KEY = "grpc-status-details-bin"

# Most specific first.
_CODES: tuple[tuple[type[errors.TandemError], grpc.StatusCode], ...] = (
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
)
_BY_CODE = {code: kind for kind, code in _CODES} | {grpc.StatusCode.ABORTED: errors.Unavailable}
_BY_REASON: dict[str, type[errors.TandemError]] = {
    kind.reason: kind for kind in (errors.NoWorker, errors.Draining, errors.PeerLost, errors.HandoffFailed)
}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: errors.TandemError) -> grpc.StatusCode:
    """Return the code that `error` ends a call with; INTERNAL for a class that has none of its own."""
    if isinstance(error, errors.Unavailable) and error.tokens_delivered:
        return grpc.StatusCode.ABORTED
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def to_status(error: errors.TandemError) -> status_pb2.Status:
    """Return `error` as a google.rpc.Status with its details."""
    code = code_of(error)
    message = error.message[:MAX_MESSAGE_CHARS]
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    retry_seconds = error.retry_after_seconds
    if retry_seconds is None and code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
        retry_seconds = DEFAULT_RETRY_SECONDS
    if retry_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(round(retry_seconds * 1e6))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, errors.InvalidRequest) and error.field:
        bad_request = error_details_pb2.BadRequest()
        bad_request.field_violations.add(field=error.field, description=message)
        status.details.add().Pack(bad_request)
    return status


def from_status(status: status_pb2.Status) -> errors.TandemError:
    """Return the member of the tree that `status` stands for; unknown codes become the root class."""
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    reason, retry_seconds, field = _details(status)
    kind = _BY_CODE.get(code, errors.TandemError)
    named = _BY_REASON.get(reason)
    if named is not None and (issubclass(named, kind) or kind is errors.TandemError):
        kind = named
    message = status.message or code.name
    if issubclass(kind, errors.InvalidRequest):
        return kind(message, field=field, reason=reason or None)
    error = kind(message, reason=reason or None, retry_after_seconds=retry_seconds)
    if isinstance(error, errors.Unavailable):
        error.tokens_delivered = code is grpc.StatusCode.ABORTED
    return error


def _details(status: status_pb2.Status) -> tuple[str, float | None, str]:
    """Return (reason, retry seconds, field) as far as the details name them; unknown and broken ones are skipped."""
    reason, retry_seconds, field = "", None, ""
    for detail in status.details:
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        with contextlib.suppress(DecodeError):
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(retry):
                retry_seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
            elif detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
    return reason, retry_seconds, field


async def abort(context: aio.ServicerContext[Any, Any], error: errors.TandemError) -> NoReturn:
    """End the call with `error`'s status."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort_with_status returned")


def from_rpc_error(error: aio.AioRpcError) -> errors.TandemError:
    """Return what a failed call of ours met, details included where the peer sent them."""
    status = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            rich = _parse(value)
            if rich is not None and rich.code == status.code:
                status = rich
    return from_status(status)


def _parse(serialized: bytes) -> status_pb2.Status | None:
    try:
        return status_pb2.Status.FromString(serialized)
    except DecodeError:
        return None  # the code alone has to do

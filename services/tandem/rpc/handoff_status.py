"""How a Handoff stream ends, as a gRPC status: EndCode out, EndCode back in.

The exact code travels in ErrorInfo (domain `tandem.handoff`, reason the code's value). A status without it comes from
gRPC itself or from something that is no exporter of ours: then the status code decides, and LOST is the answer to
everything that says nothing about the hand-off.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from tandem.core.messages.handoff import EndCode
from tandem.rpc.status import MAX_MESSAGE_CHARS

DOMAIN = "tandem.handoff"
INSTANCE_METADATA = "x-tandem-instance-id"  # hex: which life of the exporter the importer means
_DETAILS_KEY = "grpc-status-details-bin"
_MAX_DETAILS_BYTES = 16384

_CODES = {
    EndCode.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    EndCode.MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    EndCode.STALE_ATTEMPT: grpc.StatusCode.ALREADY_EXISTS,
    EndCode.SUPERSEDED: grpc.StatusCode.ABORTED,
    EndCode.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EndCode.DRAINING: grpc.StatusCode.UNAVAILABLE,
    EndCode.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    EndCode.LOST: grpc.StatusCode.INTERNAL,
}
_WITHOUT_DETAILS = {
    grpc.StatusCode.INVALID_ARGUMENT: EndCode.INVALID,
    grpc.StatusCode.OUT_OF_RANGE: EndCode.INVALID,
    grpc.StatusCode.UNIMPLEMENTED: EndCode.MISMATCH,  # not a prefill worker
    grpc.StatusCode.UNAUTHENTICATED: EndCode.MISMATCH,
    grpc.StatusCode.PERMISSION_DENIED: EndCode.MISMATCH,
    grpc.StatusCode.RESOURCE_EXHAUSTED: EndCode.OVERLOADED,
    grpc.StatusCode.DEADLINE_EXCEEDED: EndCode.DEADLINE,
}


def end_status(code: EndCode, message: str, *, status_code: grpc.StatusCode | None = None) -> grpc.Status:
    """Return the status that an exporter ends a stream with; `code` is not OK.

    `status_code` replaces the usual one; the importer still reads `code`.
    """
    number = (status_code or _CODES[code]).value[0]
    status = status_pb2.Status(code=number, message=message[:MAX_MESSAGE_CHARS])
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=code.value, domain=DOMAIN))
    return rpc_status.to_status(status)


async def abort(
    context: aio.ServicerContext[Any, Any], code: EndCode, message: str, status_code: grpc.StatusCode | None = None
) -> NoReturn:
    """End the call."""
    await context.abort_with_status(end_status(code, message, status_code=status_code))
    raise AssertionError("abort_with_status returned")


def end_code(code: grpc.StatusCode, details: str, trailing_metadata: Any) -> tuple[EndCode, str]:
    """Return how the exporter, or the network, ended a stream, from the call's final status."""
    if code is grpc.StatusCode.OK:
        return EndCode.OK, ""
    for key, value in trailing_metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes) and len(value) <= _MAX_DETAILS_BYTES:
            exact = _exact_code(value)
            if exact is not None:
                return exact, details
    return _WITHOUT_DETAILS.get(code, EndCode.LOST), f"{code.name}: {details}"


def _exact_code(serialized: bytes) -> EndCode | None:
    try:
        status = status_pb2.Status.FromString(serialized)
    except DecodeError:
        return None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            try:
                return EndCode(info.reason)
            except ValueError:
                return None  # a code of a later version
    return None

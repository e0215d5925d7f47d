"""Every error that a user or a peer can meet, as one tree.

TandemError
|- ConfigError                     exit code 2, never on the wire
|- InvalidRequest                  INVALID_ARGUMENT
|  `- NotFound                     NOT_FOUND (model, adapter)
|- Unauthenticated                 UNAUTHENTICATED
|- PermissionDenied                PERMISSION_DENIED
|- Overloaded                      RESOURCE_EXHAUSTED, with RetryInfo
|- Unavailable                     UNAVAILABLE, with RetryInfo; ABORTED once tokens were delivered
|  |- NoWorker
|  |- Draining
|  `- PeerLost
|- HandoffFailed                   INTERNAL; handled by re-pairing or local compute first
|- DeadlineExceeded                DEADLINE_EXCEEDED
|- Cancelled                       CANCELLED
`- TransportError                  stays inside transfer/, where it becomes an outcome

A broken invariant is an assertion, not a member of this tree.
Which gRPC status a class has is decided in one place, `tandem.rpc.status`.
"""

from __future__ import annotations


class TandemError(Exception):
    """Root of the tree. `reason` is the stable upper-case word that machines read (ErrorInfo.reason)."""

    reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        if reason is not None:
            self.reason = reason


class ConfigError(TandemError):
    """The configuration cannot be served. Carries every fault found, one a line."""

    reason = "CONFIG"


class InvalidRequest(TandemError):
    """The client's request is at fault; `field` names the part, in the words of the public API."""

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, *, field: str = "", reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.field = field


class NotFound(InvalidRequest):
    """The named model or adapter is not served here."""

    reason = "NOT_FOUND"


class Unauthenticated(TandemError):
    """No credentials, or wrong ones."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(TandemError):
    """Known, but not allowed."""

    reason = "PERMISSION_DENIED"


class Overloaded(TandemError):
    """A bound was reached; trying again later helps."""

    reason = "OVERLOADED"


class Unavailable(TandemError):
    """Nobody can serve this now. `tokens_delivered`: the client has received a part of the answer (ABORTED then)."""

    reason = "UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after_seconds: float | None = None,
        tokens_delivered: bool = False,
    ) -> None:
        super().__init__(message, reason=reason, retry_after_seconds=retry_after_seconds)
        self.tokens_delivered = tokens_delivered


class NoWorker(Unavailable):
    """No ready worker of the role that is needed."""

    reason = "NO_WORKER"


class Draining(Unavailable):
    """The worker takes no new work."""

    reason = "DRAINING"


class PeerLost(Unavailable):
    """The worker that held the request is gone."""

    reason = "WORKER_LOST"


class HandoffFailed(TandemError):
    """KV pages could not be handed over, and every remedy failed."""

    reason = "KV_TRANSFER"


class DeadlineExceeded(TandemError):
    """The request's deadline passed."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(TandemError):
    """The client went away or cancelled."""

    reason = "CANCELLED"


class TransportError(TandemError):
    """A data plane failed. Never leaves transfer/."""

    reason = "TRANSPORT"

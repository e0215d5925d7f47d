"""What rank 0 and its transfer process say to each other. Every page number is one of this rank's own pool."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tandem.core.messages.handoff import RankEndpoint

# ---- rank -> transfer process -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Export:
    """Hash these pages and serve them to holders of `token`. Answered by Exported.

    `pages[i]` has ordinal first_ordinal + i. The pages are final: nobody writes to them until Revoked has come.
    A higher attempt replaces the token of a lower one at once; the lower is served no longer.
    """

    handoff_id: bytes
    attempt: int
    token: bytes
    first_ordinal: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Revoke:
    """Serve nothing of this hand-off any more, in any attempt. Answered by Revoked once no read can be under way."""

    handoff_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """Read `ordinals` from the endpoint into `pages` (same order) and verify each. Answered by exactly one PullEnded.

    `checksums` are packed little-endian uint64 and `remote_pages` packed uint32 (empty unless one-sided), same order.
    """

    ticket: int
    endpoint: RankEndpoint
    handoff_id: bytes
    attempt: int
    token: bytes
    ordinals: tuple[int, ...]
    checksums: bytes
    remote_pages: bytes
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelPull:
    """Break a pull off. Its PullEnded still comes, as soon as nothing more can arrive in its pages."""

    ticket: int


# ---- transfer process -> rank -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TransferReady:
    """The transfer process serves. `endpoints` has one entry a transport that it exports over, best first.

    `imports` names the transports that it can pull over, best first. `notes` says why others are not there.
    """

    instance_id: bytes
    endpoints: tuple[RankEndpoint, ...]
    imports: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TransferLost:
    """The transfer process is gone: all of its reads are over, nothing is exported. A TransferReady follows."""

    message: str = ""


@dataclass(frozen=True, slots=True)
class Exported:
    handoff_id: bytes
    attempt: int
    first_ordinal: int
    checksums: bytes  # packed little-endian uint64, one a page


@dataclass(frozen=True, slots=True)
class Revoked:
    handoff_id: bytes


class PullStatus(Enum):
    DONE = "done"  # every page arrived and matched
    MISMATCH = "mismatch"  # every page arrived, `bad_ordinals` did not match
    REFUSED = "refused"  # the peer does not know the hand-off, the attempt, the token or an ordinal
    FAILED = "failed"  # connection lost, no progress, peer replaced
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullEnded:
    """The end of a pull *and* the proof that nothing more can arrive in its pages.

    `good_ordinals` were verified before use; after FAILED, REFUSED or CANCELLED they may be some of those asked for.
    """

    ticket: int
    status: PullStatus
    good_ordinals: tuple[int, ...] = ()
    bad_ordinals: tuple[int, ...] = ()
    num_bytes: int = 0
    seconds: float = 0.0
    transport: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class TransportFallback:
    """A pair fell back to another transport. Logged once, exported as a metric."""

    peer_instance_id: bytes
    from_transport: str
    to_transport: str
    message: str


TransferCommand = Export | Revoke | Pull | CancelPull
TransferOutcome = TransferReady | TransferLost | Exported | Revoked | PullEnded | TransportFallback

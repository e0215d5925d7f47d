"""What a scheduler and its worker's transfer processes say to each other. A page has one number in all ranks' pools.

The scheduler speaks of whole pages of the model (Export, Pull); worker/transfer_group.py cuts that into what each
rank's own process does (RankExport, RankPull) and puts the answers together. core/sharding.py numbers the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tandem.core.messages.handoff import RankEndpoint, Sharding

# ---- scheduler -> all ranks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Export:
    """Hash these pages on every rank and serve them to holders of `token`. Answered by Exported.

    `pages[i]` has ordinal first_ordinal + i. The pages are final: nobody writes to them until Revoked has come.
    A higher attempt replaces the token of a lower one at once; the lower is served no longer. `importer` reads them.
    """

    handoff_id: bytes
    attempt: int
    token: bytes
    first_ordinal: int
    pages: tuple[int, ...]
    importer: Sharding = Sharding()


@dataclass(frozen=True, slots=True)
class Revoke:
    """Serve nothing of this hand-off any more, in any attempt. Answered by Revoked once no read can be under way."""

    handoff_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """Read `ordinals` from all exporting ranks into `pages` of all ranks (same order) and verify every piece of each.

    Answered by exactly one PullEnded. `endpoints` are of one transport, one an exporting rank, by rank. `checksums`
    are packed little-endian uint64, those of a piece together; `remote_pages` packed uint32 (empty unless one-sided).
    """

    ticket: int
    endpoints: tuple[RankEndpoint, ...]
    exporter: Sharding
    handoff_id: bytes
    attempt: int
    token: bytes
    ordinals: tuple[int, ...]
    checksums: bytes
    remote_pages: bytes
    pages: tuple[int, ...]


# ---- a rank -> its transfer process -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slab:
    """Some bytes of every page of a pool: `num_runs` runs of `run_bytes`, `stride` apart, the first at `offset`."""

    offset: int
    run_bytes: int
    stride: int
    num_runs: int

    @property
    def num_bytes(self) -> int:
        return self.num_runs * self.run_bytes

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + (self.num_runs - 1) * self.stride + self.run_bytes


@dataclass(frozen=True, slots=True)
class RankExport:
    """One rank's share of an Export. `pieces` are what each importing rank reads of a page; none: one, all of it.

    The checksums of its Exported come piece by piece.
    """

    handoff_id: bytes
    attempt: int
    token: bytes
    first_ordinal: int
    pages: tuple[int, ...]
    pieces: tuple[Slab, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a piece lies in the exporting rank's pages, for transports that name memory."""

    page_bytes: int
    slab: Slab


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPull:
    """Read one piece of `ordinals` from one exporting rank into `pages`. Answered by exactly one PullEnded.

    `piece` counts the exporting rank's pieces, `slab` is where it belongs in this rank's pages, and `source` where it
    lies in the exporter's. None: the whole page.
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
    piece: int = 0
    slab: Slab | None = None
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class CancelPull:
    """Break a pull off. Its PullEnded still comes, as soon as nothing more can arrive in its pages."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Every piece of these pages is verified: tell the rank's device. For the rank itself, not for its process."""

    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Restart:
    """End the process's present life at once; TransferLost follows. For the rank itself: the process may be stuck."""


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
    checksums: bytes  # packed little-endian uint64, one a page, piece by piece


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
RankCommand = RankExport | Revoke | RankPull | CancelPull | Adopt | Restart
TransferOutcome = TransferReady | TransferLost | Exported | Revoked | PullEnded | TransportFallback

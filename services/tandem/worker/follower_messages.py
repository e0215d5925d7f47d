"""What rank 0 and a follower, one of the worker's other ranks, say to each other. Both keep their order.

The order of the classes is the wire form; both ends are of one version.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import Config, Role
from tandem.core.messages.plans import Plan, PlanResolved
from tandem.core.messages.transfer import (
    Adopt,
    CancelPull,
    Exported,
    PullEnded,
    RankExport,
    RankPull,
    Restart,
    Revoke,
    Revoked,
    TransferLost,
    TransferReady,
    TransportFallback,
)
from tandem.core.messages.worker import StartupProgress
from tandem.ipc import Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFollower:
    """The first message to a follower: who it is, and where the ranks meet. `own_host`: where others reach it."""

    role: Role
    config: Config
    rank: int
    meeting_host: str
    meeting_port: int
    own_host: str
    worker_host: str  # where peers of the KV transfer reach it


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowerReady:
    """A follower executes plans now. What it holds, for people."""

    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int
    weight_bytes: int
    pool_bytes: int
    pool_pages: str
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class FollowerFailed:
    """A follower cannot go on. `by_others`: because another rank was lost, or did not take part."""

    message: str
    exit_code: int = 1
    by_others: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """A follower with unfinished plans says every second that its process runs."""


TO_FOLLOWER = Schema((StartFollower, Plan, RankExport, Revoke, RankPull, CancelPull, Adopt, Restart))
FROM_FOLLOWER = Schema(
    (
        StartupProgress,
        FollowerReady,
        FollowerFailed,
        Beat,
        PlanResolved,
        TransferReady,
        TransferLost,
        Exported,
        Revoked,
        PullEnded,
        TransportFallback,
    )
)

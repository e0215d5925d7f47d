"""The pipe between a rank and its transfer process: which messages each direction carries, and how the child starts."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tandem.config import HandoffConfig, TlsConfig, TransferConfig
from tandem.core.messages.transfer import (
    CancelPull,
    Exported,
    PullEnded,
    RankExport,
    RankPull,
    Revoke,
    Revoked,
    TransferLost,
    TransferReady,
    TransportFallback,
)
from tandem.ipc import Schema
from tandem.transfer.layout import KvLayout
from tandem.transfer.memory import PoolPages

COMMANDS = Schema([RankExport, Revoke, RankPull, CancelPull])
OUTCOMES = Schema([TransferReady, TransferLost, Exported, Revoked, PullEnded, TransportFallback])


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The one argument of the transfer process, as JSON. It owns both descriptors; keys are only paths."""

    transfer: TransferConfig
    handoff: HandoffConfig
    layout: KvLayout
    worker_host: str
    memory_fd: int
    memory_pages: PoolPages
    channel_fd: int
    tls: TlsConfig = TlsConfig()

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> Launch:
        return msgspec.json.decode(text, type=cls)

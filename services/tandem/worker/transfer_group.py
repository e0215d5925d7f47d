"""The transfer processes of all ranks as one: the scheduler on rank 0 decides, each rank's process does its part.

`links[rank]` leads to the process of that rank; the first one's is this process's own child. What the scheduler hears
is what has happened on every rank. When one process is gone, the others first let go of everything: only then is
TransferLost said, so that it means the same as for a single process.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tandem.core.messages.handoff import Sharding
from tandem.core.messages.transfer import (
    Adopt,
    CancelPull,
    Export,
    Exported,
    Pull,
    PullEnded,
    RankCommand,
    Restart,
    Revoke,
    Revoked,
    TransferCommand,
    TransferLost,
    TransferOutcome,
    TransferReady,
    TransportFallback,
)
from tandem.transfer.layout import KvLayout
from tandem.worker.transfer_cut import PullMerge, TransferCut

LEAVE_SECONDS = 5.0  # for a process to let go of everything once another one is gone; then it is ended, too


class Watched(Protocol):
    """Something that a selector can watch; it wants to write while bytes are pending."""

    def fileno(self) -> int: ...

    @property
    def pending_bytes(self) -> int: ...


class RankLink(Protocol):
    """The way to one rank's transfer process, over as many of its lives as there are. Nothing here blocks.

    TransferLost comes once for each life that had been ready, after everything else that it said; commands sent after
    a life's end and before the next one's TransferReady are dropped. Commands and outcomes keep their order.
    """

    @property
    def channel(self) -> Watched | None:
        """What to watch; None while there is nothing."""
        ...

    def next_due(self) -> float | None:
        """When `advance` wants to be called."""
        ...

    def advance(self) -> Sequence[TransferOutcome]: ...

    def send(self, command: RankCommand) -> None:
        """Queue a command; `flush` after a batch."""
        ...

    def flush(self) -> None: ...

    def receive(self) -> Sequence[TransferOutcome]:
        """Take what has come; nothing, if nothing has."""
        ...

    def stop(self) -> None: ...


class TransferGroup:
    """Cuts commands, merges outcomes. `model` is the layout that a single rank would have."""

    def __init__(
        self,
        links: Sequence[RankLink],
        model: KvLayout,
        sharding: Sharding,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._links = links
        self._clock = clock
        self._cut = TransferCut(model, sharding)
        assert len(links) == len(self._cut.parts), "one link a rank"
        self._tickets = itertools.count(1)
        self._readies: list[TransferReady | None] = [None] * len(links)
        self._is_up = False  # the scheduler has heard TransferReady, and nothing is lost since
        self._exports: dict[tuple[bytes, int, int], list[bytes | None]] = {}  # checksums by rank, as they come
        self._serving: set[bytes] = set()  # hand-offs that were exported and are not known to be revoked
        self._revoking: dict[bytes, set[int]] = {}  # ranks that have not acknowledged
        self._pulls: dict[int, PullMerge] = {}
        self._owner: dict[int, PullMerge] = {}  # by a piece's ticket
        self._lost: TransferLost | None = None  # to be said once `_leaving` is empty
        self._leaving: set[tuple[int, bytes | int]] = set()  # (rank, hand-off or ticket) that others still hold
        self._leave_due = 0.0

    @property
    def channels(self) -> list[Watched]:
        """What to watch now."""
        return [channel for link in self._links if (channel := link.channel) is not None]

    def next_due(self) -> float | None:
        """When `advance` wants to be called."""
        dues = [due for link in self._links if (due := link.next_due()) is not None]
        return min(dues + ([self._leave_due] if self._leaving else []), default=None)

    def advance(self) -> list[TransferOutcome]:
        """Start what is due, give up what does not come."""
        if self._leaving and self._clock() >= self._leave_due:
            self._leave_due = self._clock() + LEAVE_SECONDS
            for rank in {rank for rank, _ in self._leaving}:
                self._links[rank].send(Restart())
            self.flush()
        return [said for rank, link in enumerate(self._links) for said in self._hear(rank, link.advance())]

    def receive(self) -> list[TransferOutcome]:
        """Take what the ranks' processes say; return what that means for the worker."""
        return [said for rank, link in enumerate(self._links) for said in self._hear(rank, link.receive())]

    def send(self, command: TransferCommand) -> None:
        """Queue a command; `flush` after a batch. Dropped while a process is gone: TransferLost has ended all."""
        if not self._is_up:
            return
        match command:
            case Export():
                key = (command.handoff_id, command.attempt, command.first_ordinal)
                self._exports[key] = [None] * len(self._links)
                self._serving.add(command.handoff_id)
                for link, own in zip(self._links, self._cut.exports(command), strict=True):
                    link.send(own)
            case Revoke():
                for key in [key for key in self._exports if key[0] == command.handoff_id]:
                    del self._exports[key]
                self._revoke(command.handoff_id)
            case Pull():
                self._pull(command)
            case CancelPull():
                if (merge := self._pulls.get(command.ticket)) is not None:
                    self._cancel(merge)

    def flush(self) -> None:
        """Write what the ways to the ranks take."""
        for link in self._links:
            link.flush()

    def stop(self) -> None:
        """End every process for good."""
        for link in self._links:
            link.stop()

    # ---- commands -------------------------------------------------------------------------------------------------

    def _revoke(self, handoff_id: bytes) -> None:
        self._revoking[handoff_id] = set(range(len(self._links)))
        for link in self._links:
            link.send(Revoke(handoff_id))

    def _pull(self, pull: Pull) -> None:
        shares = self._cut.pulls(pull, lambda: next(self._tickets))
        merge = self._pulls[pull.ticket] = PullMerge(pull, {own.ticket: rank for rank, own in shares})
        for rank, own in shares:
            self._owner[own.ticket] = merge
            self._links[rank].send(own)

    def _cancel(self, merge: PullMerge) -> None:
        for ticket, rank in merge.running.items():
            self._links[rank].send(CancelPull(ticket))

    # ---- outcomes -------------------------------------------------------------------------------------------------

    def _hear(self, rank: int, outcomes: Sequence[TransferOutcome]) -> list[TransferOutcome]:
        said: list[TransferOutcome] = []
        for outcome in outcomes:
            match outcome:
                case TransferReady():
                    self._readies[rank] = outcome
                case TransferLost():
                    self._rank_lost(rank, outcome)
                case Exported():
                    said += self._exported(rank, outcome)
                case Revoked():
                    said += self._revoked(rank, outcome)
                case PullEnded():
                    said += self._piece_ended(rank, outcome)
                case TransportFallback():
                    said.append(outcome)
            said += self._turn()
        return said

    def _exported(self, rank: int, outcome: Exported) -> list[TransferOutcome]:
        key = (outcome.handoff_id, outcome.attempt, outcome.first_ordinal)
        found = self._exports.get(key)
        if found is None:
            return []  # revoked meanwhile
        found[rank] = outcome.checksums
        whole = [checksums for checksums in found if checksums is not None]
        if len(whole) < len(found):
            return []
        del self._exports[key]
        return [Exported(*key, b"".join(whole))]

    def _revoked(self, rank: int, outcome: Revoked) -> list[TransferOutcome]:
        self._leaving.discard((rank, outcome.handoff_id))
        missing = self._revoking.get(outcome.handoff_id)
        if missing is None:
            return []
        missing.discard(rank)
        if missing:
            return []
        del self._revoking[outcome.handoff_id]
        self._serving.discard(outcome.handoff_id)
        return [outcome]

    def _piece_ended(self, rank: int, outcome: PullEnded) -> list[TransferOutcome]:
        self._leaving.discard((rank, outcome.ticket))
        merge = self._owner.pop(outcome.ticket, None)
        if merge is None:
            return []
        had_failed = merge.has_failed
        merge.note(outcome)
        if merge.running:
            if merge.has_failed and not had_failed:
                self._cancel(merge)
                self.flush()
            return []
        del self._pulls[merge.pull.ticket]
        ended = merge.outcome()
        if ended.good_ordinals:
            page_of = dict(zip(merge.pull.ordinals, merge.pull.pages, strict=True))
            pages = tuple(page_of[ordinal] for ordinal in ended.good_ordinals)
            for link in self._links:
                link.send(Adopt(pages))
            self.flush()
        return [ended]

    # ---- the loss of a process ------------------------------------------------------------------------------------

    def _rank_lost(self, rank: int, lost: TransferLost) -> None:
        """What a process read and served is over with it; the others are told to let go."""
        self._readies[rank] = None
        if self._is_up:
            self._is_up = False
            self._lost = lost if len(self._links) == 1 else TransferLost(f"rank {rank}: {lost.message}")
            for merge in self._pulls.values():
                self._leaving |= {(owner, ticket) for ticket, owner in merge.running.items()}
                self._cancel(merge)
            for handoff_id in self._serving:
                if handoff_id not in self._revoking:
                    self._revoke(handoff_id)
            self._leaving |= {(owner, key) for key, missing in self._revoking.items() for owner in missing}
            for ended in (self._exports, self._serving, self._revoking, self._pulls, self._owner):
                ended.clear()
            self._leave_due = self._clock() + LEAVE_SECONDS
            self.flush()
        self._leaving = {(owner, key) for owner, key in self._leaving if owner != rank}

    def _turn(self) -> list[TransferOutcome]:
        """Say that the processes are gone, or there again, once that is true of all."""
        said: list[TransferOutcome] = []
        if self._lost is not None and not self._leaving:
            said.append(self._lost)
            self._lost = None
        if self._lost is None and not self._is_up:
            readies = [ready for ready in self._readies if ready is not None]
            if len(readies) == len(self._links):
                self._is_up = True
                said.append(self._cut.ready(readies))
        return said

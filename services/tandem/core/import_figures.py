"""What decode counts of the hand-offs that it receives. Decides nothing."""

from __future__ import annotations

from tandem.core.imports import Import, Ticket
from tandem.core.ledger import Ledger
from tandem.core.messages.handoff import EndCode
from tandem.core.messages.transfer import PullEnded, PullStatus
from tandem.core.stats import NO_TRANSPORT

# How a stream's end is counted among HANDOFF_FAILURES.
FAILURE_OF = {
    EndCode.OK: "lost",  # ended before it was released
    EndCode.INVALID: "protocol",
    EndCode.MISMATCH: "incompatible",
    EndCode.STALE_ATTEMPT: "superseded",
    EndCode.SUPERSEDED: "superseded",
    EndCode.OVERLOADED: "overloaded",
    EndCode.DRAINING: "draining",
    EndCode.DEADLINE: "deadline",
    EndCode.LOST: "lost",
}


def note_numerics(ledger: Ledger, imp: Import, numerics: str) -> None:
    """The peer has accepted, and computes with these."""
    ledger.tallies.handoffs.accepted(imp.peer.address, numerics, differs=numerics != ledger.settings.numerics)


def count_pull(ledger: Ledger, ticket: Ticket, event: PullEnded) -> None:
    """A pull is over, of this attempt or an earlier one."""
    counters = ledger.counters
    counters.transferred_bytes += event.num_bytes
    counters.transfer_seconds += event.seconds
    counters.checksum_mismatches += len(event.bad_ordinals)
    failed = event.status in (PullStatus.REFUSED, PullStatus.FAILED)
    counters.failed_pulls += failed and ticket.is_current
    ledger.tallies.handoffs.pulled(
        ticket.owner.peer.address,
        event.transport or _transport(ticket.owner),
        event.status.value,
        num_bytes=event.num_bytes,
        seconds=event.seconds,
        num_bad_pages=len(event.bad_ordinals),
    )


def count_failure(ledger: Ledger, imp: Import, reason: str) -> None:
    """The present attempt met what ends it, or pages that have to be read again; `reason` is of HANDOFF_FAILURES."""
    ledger.tallies.handoffs.failed(imp.peer.address, _transport(imp), reason)


def count_landing(ledger: Ledger, imp: Import, now: float) -> None:
    """Every page of the prompt is verified and the first token known."""
    marks, tallies = imp.request.marks, ledger.tallies
    marks.landed = now
    tallies.handoffs.landed(imp.peer.address)
    if marks.pull_started:
        tallies.handoff.observe(max(0.0, marks.pull_ended - marks.pull_started))
    if marks.first_token:
        tallies.handoff_stall.observe(now - marks.first_token)


def _transport(imp: Import) -> str:
    return imp.endpoints[0].transport if imp.endpoints else NO_TRANSPORT

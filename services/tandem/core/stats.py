"""Figures that a worker reports about itself. They travel with results; the frontend and the gateway export them."""

from __future__ import annotations

from dataclasses import dataclass, field

# Upper bounds of histograms, ascending; one more bucket is above the last.
WAIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PULL_RESULTS = ("done", "mismatch", "refused", "failed", "cancelled")
# Why an attempt to receive a hand-off failed. The last four are the peer's orderly refusals.
HANDOFF_FAILURES = (
    "incompatible",  # no transport or checksum in common, or another model
    "protocol",  # one side said what makes no sense
    "integrity",  # pages differed from what was announced
    "pull",  # pages could not be read
    "lost",  # the stream broke
    "superseded",  # a higher attempt had taken over
    "overloaded",
    "draining",
    "deadline",
)
NO_TRANSPORT = "none"  # the attempt failed before one was chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Every page is in exactly one of these states; they add up to the pool."""

    free: int = 0
    held: int = 0  # referenced by requests and hand-offs
    cached: int = 0  # in the prefix tree, unreferenced, evictable
    quarantined: int = 0  # released, but a launch or a transfer may still touch it
    total: int = 0


@dataclass(frozen=True, slots=True)
class HistogramCounts:
    """Observations by bucket, not cumulated: one count a bound, one above the last. Empty: none yet."""

    counts: tuple[int, ...] = ()
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportFigures:
    """What decode has received over one transport."""

    transport: str
    pulls: dict[str, int]  # by PULL_RESULTS
    num_bytes: int
    seconds: float  # summed over pulls
    mismatched_pages: int
    failures: dict[str, int]  # attempts, by HANDOFF_FAILURES


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFigures:
    """What decode has received from one prefill peer; the address "other" sums those that were long ago.

    `numerics` is what the peer said last; `differing` is 1 if it is not this worker's own, for "other" their number.
    """

    address: str
    landed: int
    failed: int  # attempts
    num_bytes: int
    numerics: str = ""
    differing: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """The load of one worker at one instant, and its running totals."""

    running_requests: int = 0
    waiting_requests: int = 0
    waiting_uncached_tokens: int = 0
    pages: PageCounts = PageCounts()
    transfers_inflight: int = 0  # decode: pulling; prefill: announced, not released
    transfers_waiting: int = 0  # decode: waiting for pages
    leased_handoffs: int = 0
    fenced_instance_ids: tuple[bytes, ...] = ()
    draining: bool = False
    # running totals
    steps: int = 0
    device_seconds: float = 0.0
    device_idle_seconds: float = 0.0  # the loop had no plan at the device
    computed_tokens: int = 0
    generated_tokens: int = 0
    discarded_rows: int = 0
    retractions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    transferred_bytes: int = 0
    transfer_seconds: float = 0.0
    checksum_mismatches: int = 0
    failed_pulls: int = 0
    first_token_differences: int = 0  # another prefill sampled otherwise than the one before it
    transfer_fallbacks: int = 0
    local_prefills: int = 0  # prompts computed on decode because every named peer failed
    leases_started: int = 0
    leases_expired: int = 0
    self_check_faults: int = 0  # what an idle worker's self-check found wrong, orphaned pages included
    orphaned_pages: int = 0  # found by the self-check, in quarantine until restart
    ended_requests: dict[str, int] = field(default_factory=dict)  # by EndReason
    transports: tuple[TransportFigures, ...] = ()
    peers: tuple[PeerFigures, ...] = ()
    queue_seconds: HistogramCounts = HistogramCounts()
    prefill_seconds: HistogramCounts = HistogramCounts()
    handoff_seconds: HistogramCounts = HistogramCounts()
    handoff_stall_seconds: HistogramCounts = HistogramCounts()
    first_decode_seconds: HistogramCounts = HistogramCounts()
    step_seconds: HistogramCounts = HistogramCounts()
    batch_requests: HistogramCounts = HistogramCounts()
    batch_tokens: HistogramCounts = HistogramCounts()

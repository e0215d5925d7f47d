"""Figures that a worker reports about itself. They travel with results; the frontend and the gateway export them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Every page is in exactly one of these states; they add up to the pool."""

    free: int = 0
    held: int = 0  # referenced by requests and hand-offs
    cached: int = 0  # in the prefix tree, unreferenced, evictable
    quarantined: int = 0  # released, but a launch or a transfer may still touch it
    total: int = 0


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
    orphaned_pages: int = 0  # found by the self-check, in quarantine until restart

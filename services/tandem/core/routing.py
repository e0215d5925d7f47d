"""Which workers serve a request: a pure decision over a snapshot of the fleet. Least-loaded for now.

Not here: sessions, retries, hand-off ids (gateway.dispatch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.stats import LoadSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as this gateway sees it now. `address` is its session's, and the key of every answer."""

    address: str
    role: str  # prefill, decode, unified
    ready: bool
    instance_id: bytes = b""
    fingerprint: str = ""
    adapters: frozenset[str] = frozenset()  # digests
    max_req_input_len: int = 0  # 0: not known, accepts all
    max_running_requests: int = 0
    load: LoadSnapshot = LoadSnapshot()
    inflight: int = 0  # own requests there; of a prefill worker: those it was named first for, without a first token
    inflight_tokens: int = 0  # their prompts
    dispatched_since_load: int = 0  # own, which `load` cannot contain yet

    @property
    def takes_requests(self) -> bool:
        return self.ready and not self.load.draining


@dataclass(frozen=True, slots=True)
class Route:
    """Addresses: who owns the request, and who may compute its prompt, best first (none: the owner does)."""

    decode: str
    prefill: tuple[str, ...] = ()


def choose_route(
    fleet: Sequence[WorkerView],
    *,
    prompt_tokens: int,
    max_prefill_peers: int,
    excluded: frozenset[bytes] = frozenset(),
    adapter: str = "",
) -> Route | None:
    """Return where a prompt of this length goes; None if no decode or unified worker can take it.

    `excluded` are lives (instance ids) of workers that have failed this request already: one that has been started
    again at the same address is another worker. Equal loads are decided by address. `adapter` is the digest of the
    LoRA adapter that both sides must have.
    """
    fleet = [worker for worker in fleet if not adapter or adapter in worker.adapters]
    owners = [
        worker
        for worker in fleet
        if worker.role in ("decode", "unified")
        and worker.instance_id not in excluded
        and _accepts(worker, prompt_tokens)
    ]
    if not owners:
        return None
    owner = min(owners, key=_owner_load)
    if owner.role == "unified":
        return Route(owner.address)
    peers = [
        worker
        for worker in fleet
        if worker.role == "prefill"
        and worker.instance_id not in excluded
        and _accepts(worker, prompt_tokens)
        and worker.fingerprint == owner.fingerprint
        and worker.instance_id not in owner.load.fenced_instance_ids
    ]
    best = sorted(peers, key=_prefill_load)[:max_prefill_peers]
    return Route(owner.address, tuple(worker.address for worker in best))


def _accepts(worker: WorkerView, prompt_tokens: int) -> bool:
    return worker.takes_requests and (not worker.max_req_input_len or prompt_tokens <= worker.max_req_input_len)


def _owner_load(worker: WorkerView) -> tuple[float, float, int, str]:
    """Requests as a share of what runs at once, then the share of pages in use.

    What is reported and what this gateway has there overlap, so the larger of the two counts.
    """
    reported = worker.load.running_requests + worker.load.waiting_requests + worker.dispatched_since_load
    requests = max(reported, worker.inflight)
    pages = worker.load.pages
    used = (pages.held + pages.quarantined) / pages.total if pages.total else 0.0
    return requests / max(1, worker.max_running_requests), used, requests, worker.address


def _prefill_load(worker: WorkerView) -> tuple[int, int, str]:
    """Prompt tokens that wait, then requests; reported and own overlap here too."""
    requests = worker.load.running_requests + worker.load.waiting_requests
    return (
        max(worker.load.waiting_uncached_tokens, worker.inflight_tokens),
        max(requests, worker.inflight),
        worker.address,
    )

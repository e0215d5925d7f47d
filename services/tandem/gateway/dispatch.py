"""Gives a sequence to workers: asks for a route, names hand-offs, submits, and keeps the ledger straight.

A dispatch that is not the first of its sequence brings along the output so far, and names first the prefill workers
that know its hand-off: within their lease another decode worker pulls the same pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem.core import token_ids
from tandem.core.messages.requests import PrefillPeer, Submit
from tandem.core.routing import Route, WorkerView, choose_route
from tandem.errors import NoWorker
from tandem.gateway.fleet import Fleet, Worker
from tandem.gateway.handoffs import Handoffs
from tandem.gateway.prepared import Prepared
from tandem.rpc.convert import MAX_PREFILL_PEERS
from tandem.rpc.sequence_stream import SequenceStream

_SEED_SPAN = 1 << 64
_SEED_MIN = -(1 << 63)


@dataclass(slots=True)
class Assignment:
    """One sequence on one decode worker. `end` it exactly once, however it ended; more does nothing."""

    worker: Worker
    instance_id: bytes  # the life of the worker that has it
    rid: int
    stream: SequenceStream
    prefill: Worker | None = None
    prompt_tokens: int = 0
    has_output: bool = False  # a token came from this worker

    def prefilled(self) -> None:
        """The first token is here: the prefill worker is no longer busy with this."""
        if self.prefill is not None:
            self.prefill.prefills -= 1
            self.prefill.prefill_tokens -= self.prompt_tokens
            self.prefill = None

    def stop(self) -> None:
        """A stop string matched: the worker's last word still comes."""
        self.worker.session.abort(self.rid, stop=True)

    def end(self) -> None:
        """Cancel what is left of it on the worker."""
        self.prefilled()
        self.worker.session.abort(self.rid)


class Dispatcher:
    """Sends sequences to the fleet. `random_bytes` is the source of hand-off ids."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        max_prefill_peers: int,
        stream_buffer_tokens: int,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._fleet = fleet
        self._max_prefill_peers = max_prefill_peers
        self._stream_buffer_tokens = stream_buffer_tokens
        self._random_bytes = random_bytes
        self._watchers: dict[object, Callable[[], None]] = {}

    def new_handoffs(self) -> Handoffs:
        """Return the record of hand-offs of a new sequence."""
        return Handoffs(self._random_bytes)

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        """Call `notify` whenever a worker came, went, or changed its state, until what this returns is called."""
        key = object()
        self._watchers[key] = notify
        return lambda: self._watchers.pop(key, None) and None

    def fleet_changed(self) -> None:
        """Tell those who wait for a worker."""
        for notify in list(self._watchers.values()):
            notify()

    def dispatch(
        self,
        prepared: Prepared,
        index: int,
        notify: Callable[[], None],
        *,
        timeout_seconds: float,
        handoffs: Handoffs,
        output: Sequence[int] = (),
        excluded: frozenset[bytes] = frozenset(),
    ) -> Assignment:
        """Submit sequence `index`, which has `output` already, to a worker whose life is not among `excluded`.

        Raises NoWorker, or what the session refuses with.
        """
        views = self._fleet.views()
        route = choose_route(
            views,
            prompt_tokens=len(prepared.prompt_token_ids),
            max_prefill_peers=self._max_prefill_peers,
            excluded=excluded,
            adapter=prepared.adapter_digest,
        )
        if route is None:
            having = f" with adapter {prepared.adapter!r}" if prepared.adapter else ""
            raise NoWorker(f"no decode worker{having} is ready")
        by_address = {view.address: view for view in views}
        peers = self._peers(self._prefill(route, by_address, handoffs, prepared.adapter_digest), handoffs, len(output))
        submit = Submit(
            request_id=0,
            prompt_token_ids=token_ids.pack(prepared.prompt_token_ids),
            sampling=replace(prepared.sampling, seed=_seed(prepared.sampling.seed, index)),
            output_token_ids=token_ids.pack(output),
            peers=tuple(peer for _, peer in peers),
            timeout_seconds=timeout_seconds,
            priority=prepared.priority,
            cache_salt=prepared.cache_salt,
            adapter=prepared.adapter,
            adapter_digest=prepared.adapter_digest,
        )
        owner = self._fleet.worker(route.decode)
        stream = SequenceStream(self._stream_buffer_tokens, notify)
        rid = owner.session.submit(submit, stream, request_name=prepared.request_id, traceparent=prepared.traceparent)
        assignment = Assignment(owner, by_address[route.decode].instance_id, rid, stream)
        if peers and peers[0][1].output_tokens == len(output):  # else its token is here: nothing is left to compute
            assignment.prefill = peers[0][0]
            assignment.prompt_tokens = len(prepared.prompt_token_ids) + len(output)
            assignment.prefill.prefills += 1
            assignment.prefill.prefill_tokens += assignment.prompt_tokens
        return assignment

    def _prefill(
        self, route: Route, views: dict[str, WorkerView], handoffs: Handoffs, adapter: str
    ) -> list[WorkerView]:
        """Return who may compute the prompt: those that know this answer, then those of the route.

        One that knows it is named even if it takes no new work: it keeps what it has.
        """
        owner = views[route.decode]
        routed = [views[address] for address in route.prefill]
        if owner.role == "unified":
            return routed
        by_life = {
            view.instance_id: view
            for view in views.values()
            if view.role == "prefill"
            and view.fingerprint == owner.fingerprint
            and (not adapter or adapter in view.adapters)
            and view.instance_id not in owner.load.fenced_instance_ids
        }
        known = [by_life[life] for life in handoffs.instance_ids if life in by_life]
        return known + [view for view in routed if view not in known]

    def _peers(
        self, prefill: Sequence[WorkerView], handoffs: Handoffs, num_outputs: int
    ) -> list[tuple[Worker, PrefillPeer]]:
        peers: list[tuple[Worker, PrefillPeer]] = []
        for view in prefill:
            worker = self._fleet.worker(view.address)
            info = worker.session.info
            assert info is not None, "a worker without a session has no role"
            address = info.handoff_address or worker.address
            named = handoffs.name(address, info.instance_id, num_outputs, takes_new=view.takes_requests)
            peers += [(worker, peer) for peer in named]
        return peers[:MAX_PREFILL_PEERS]


def _seed(seed: int, index: int) -> int:
    """The seed of answer `index`, wrapped into the signed 64 bits of the wire."""
    return (seed + index - _SEED_MIN) % _SEED_SPAN + _SEED_MIN

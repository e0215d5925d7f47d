"""Gives a sequence to workers: asks for a route, mints hand-off ids, submits, and keeps the ledger straight.

A second dispatch of the same sequence avoids the worker that failed it, and names prefill workers that know its
hand-off with a higher attempt: within their lease another decode worker pulls the same pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tandem.core import token_ids
from tandem.core.messages.requests import PrefillPeer, Submit
from tandem.core.routing import choose_route
from tandem.errors import NoWorker
from tandem.gateway.fleet import Fleet, Worker
from tandem.gateway.prepared import Prepared
from tandem.rpc.convert import ID_BYTES
from tandem.rpc.sequence_stream import SequenceStream

_SEED_SPAN = 1 << 64
_SEED_MIN = -(1 << 63)


@dataclass(slots=True)
class Assignment:
    """One sequence on one decode worker. `end` it exactly once, however it ended; more does nothing."""

    worker: Worker
    rid: int
    stream: SequenceStream
    handoffs: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)  # prefill instance: its hand-off id, attempt
    prefill: Worker | None = None
    prompt_tokens: int = 0

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

    def dispatch(
        self,
        prepared: Prepared,
        index: int,
        notify: Callable[[], None],
        *,
        timeout_seconds: float,
        failed: Assignment | None = None,
    ) -> Assignment:
        """Submit sequence `index`; raises NoWorker, or what the session refuses with."""
        num_tokens = len(prepared.prompt_token_ids)
        route = choose_route(
            self._fleet.views(),
            prompt_tokens=num_tokens,
            max_prefill_peers=self._max_prefill_peers,
            excluded=frozenset() if failed is None else frozenset([failed.worker.address]),
        )
        if route is None:
            raise NoWorker("no decode worker is ready")
        handoffs = {} if failed is None else dict(failed.handoffs)
        prefill = [self._fleet.worker(address) for address in route.prefill]
        submit = Submit(
            request_id=0,
            prompt_token_ids=token_ids.pack(prepared.prompt_token_ids),
            sampling=replace(prepared.sampling, seed=_seed(prepared.sampling.seed, index)),
            peers=tuple(self._peer(worker, handoffs) for worker in prefill),
            timeout_seconds=timeout_seconds,
            priority=prepared.priority,
            cache_salt=prepared.cache_salt,
        )
        owner = self._fleet.worker(route.decode)
        stream = SequenceStream(self._stream_buffer_tokens, notify)
        rid = owner.session.submit(submit, stream, request_name=prepared.request_id, traceparent=prepared.traceparent)
        assignment = Assignment(owner, rid, stream, handoffs, prefill[0] if prefill else None, num_tokens)
        if assignment.prefill is not None:
            assignment.prefill.prefills += 1
            assignment.prefill.prefill_tokens += num_tokens
        return assignment

    def _peer(self, worker: Worker, handoffs: dict[bytes, tuple[bytes, int]]) -> PrefillPeer:
        info = worker.session.info
        assert info is not None, "a route names ready workers only"
        handoff_id, attempt = handoffs.get(info.instance_id, (b"", 0))
        handoff_id = handoff_id or self._random_bytes(ID_BYTES)
        handoffs[info.instance_id] = handoff_id, attempt + 1
        return PrefillPeer(
            address=info.handoff_address or worker.address,
            instance_id=info.instance_id,
            handoff_id=handoff_id,
            attempt=attempt + 1,
        )


def _seed(seed: int, index: int) -> int:
    """The seed of answer `index`, wrapped into the signed 64 bits of the wire."""
    return (seed + index - _SEED_MIN) % _SEED_SPAN + _SEED_MIN

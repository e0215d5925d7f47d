"""Which replica gets which message of the frontend, and what the answers tell about each replica's load.

A request goes where core.balance sends it; everything else follows its request, its stream or its hand-off. With one
replica nothing is reckoned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from tandem.config import HandoffConfig
from tandem.core.balance import Balancer
from tandem.core.handoff_homes import HandoffHomes
from tandem.core.messages.handoff import (
    EndStream,
    OpenReceived,
    ReleaseReceived,
    SendFirstToken,
    StreamLost,
)
from tandem.core.messages.requests import Cancel, Ended, Submit, Tokens
from tandem.core.messages.worker import RankReady, Stats

Deliver = Callable[[int, object], None]


class ReplicaRouter:
    """Takes the frontend's messages for a rank (`send`), and is shown what the ranks say (`heard`)."""

    def __init__(
        self,
        deliver: Deliver,
        handoff: HandoffConfig,
        *,
        prefix_cache: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deliver = deliver
        self._prefix_cache = prefix_cache
        self._clock = clock
        # A scheduler remembers an ended hand-off for at most the larger of these two, and ends it a lease after its
        # last stream.
        self._homes = HandoffHomes(handoff.lease_seconds + max(60.0, 2 * handoff.lease_seconds))
        self._balancer: Balancer | None = None

    def open_for(self, ready: RankReady) -> None:
        """Messages may come from now on."""
        if ready.data_size > 1:
            self._balancer = Balancer(
                ready.data_size,
                page_tokens=ready.page_tokens,
                num_pages=ready.num_pages // ready.data_size,
                prefix_cache=self._prefix_cache,
            )

    @property
    def balancer(self) -> Balancer | None:
        """The ledger of live requests; None with one replica."""
        return self._balancer

    def send(self, message: object) -> None:
        """Deliver a message to the replica that it belongs to; what belongs to nobody any more is dropped."""
        if self._balancer is None:
            self._deliver(0, message)
            return
        replica = self._replica_for(self._balancer, message)
        if replica is not None:
            self._deliver(replica, message)

    def heard(self, replica: int, message: object) -> None:
        """Note what a replica says about its requests and itself."""
        balancer = self._balancer
        if balancer is None:
            return
        match message:
            case Tokens():
                balancer.output(message.request_id, len(message.token_ids))
            case Ended():
                balancer.ended(message.request_id)
            case SendFirstToken():
                known = self._homes.of_stream(message.stream_id)
                if known is not None:
                    balancer.output(known[0], 1)
            case EndStream():
                self._closed(balancer, message.stream_id)
            case Stats():
                balancer.reported(replica, message.load)

    def _replica_for(self, balancer: Balancer, message: object) -> int | None:
        match message:
            case Submit():
                cacheable = message.sampling.prompt_logprobs is None
                tokens = message.prompt_token_ids + message.output_token_ids
                salt = _salt(message.cache_salt, message.adapter)
                return balancer.place(message.request_id, tokens, salt, cacheable=cacheable)
            case Cancel():
                return balancer.replica_of(message.request_id)
            case OpenReceived():
                return self._opened(balancer, message)
            case ReleaseReceived():
                known = self._homes.of_stream(message.stream_id)
                return known[1] if known is not None else None
            case StreamLost():
                known = self._homes.of_stream(message.stream_id)
                self._closed(balancer, message.stream_id)
                return known[1] if known is not None else None
        raise AssertionError(f"{type(message).__name__} belongs to no request")

    def _opened(self, balancer: Balancer, message: OpenReceived) -> int:
        opened = message.open
        key: Hashable = opened.handoff_id
        replica = self._homes.find(opened.handoff_id, self._clock())
        if replica is None:
            cacheable = opened.sampling.prompt_logprobs is None
            salt = _salt(opened.cache_salt, opened.adapter_digest)
            replica = balancer.place(key, opened.prompt_token_ids, salt, cacheable=cacheable)
        elif balancer.replica_of(key) is None:
            balancer.hold(key, replica, opened.prompt_token_ids)
        self._homes.opened(opened.handoff_id, message.stream_id, replica)
        return replica

    def _closed(self, balancer: Balancer, stream_id: int) -> None:
        known = self._homes.of_stream(stream_id)
        if self._homes.closed(stream_id, self._clock()) and known is not None:
            balancer.ended(known[0])


def _salt(cache_salt: str, adapter: str) -> str:
    """Pages are shared neither across salts nor across adapters."""
    return f"{adapter}\0{cache_salt}" if adapter else cache_salt

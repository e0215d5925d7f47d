"""A pair that one-sided reads have failed goes on over TCP: visibly, once, and for as long as this process lives."""

from __future__ import annotations

import dataclasses
import threading

from tandem.core.messages.transfer import PullEnded, PullStatus, RankPull, TransportFallback
from tandem.errors import TransportError
from tandem.transfer.choice import TCP
from tandem.transfer.contract import Importer, Post, PullDone
from tandem.transfer.one_sided import OneSidedAddress

_MAX_PEERS = 4096  # remembered; the oldest is forgotten, and tried again


class FallbackImporter:
    """Wraps a one-sided importer. A pull that failed there is repeated over TCP under the same ticket."""

    def __init__(self, transport: str, first: Importer, second: Importer, post: Post) -> None:
        self._transport = transport
        self._first = first
        self._second = second
        self._post = post
        self._lock = threading.Lock()
        self._fallen: dict[bytes, None] = {}  # instance ids, oldest first
        self._under_way: dict[int, bool] = {}  # ticket: whether it was cancelled

    def pull(self, pull: RankPull, done: PullDone) -> None:
        with self._lock:
            has_fallen = pull.endpoint.instance_id in self._fallen
            self._under_way[pull.ticket] = False
        if has_fallen:
            self._pull_second(pull, lambda ended: self._finish(ended, done))
        else:
            self._first.pull(pull, lambda ended: self._first_ended(pull, ended, done))

    def cancel(self, ticket: int) -> None:
        with self._lock:
            if ticket in self._under_way:
                self._under_way[ticket] = True
        self._first.cancel(ticket)
        self._second.cancel(ticket)

    def close(self) -> None:
        """Close the first; the second is closed by whoever owns it."""
        self._first.close()

    def _first_ended(self, pull: RankPull, ended: PullEnded, done: PullDone) -> None:
        with self._lock:
            is_cancelled = self._under_way[pull.ticket]
        if ended.status is not PullStatus.FAILED or is_cancelled:
            self._finish(ended, done)
            return
        self._pull_second(pull, lambda again: self._second_ended(pull, ended, again, done))
        with self._lock:
            is_cancelled = self._under_way.get(pull.ticket, False)
        if is_cancelled:  # the cancel may have come between the two
            self._second.cancel(pull.ticket)

    def _second_ended(self, pull: RankPull, ended: PullEnded, again: PullEnded, done: PullDone) -> None:
        """A peer that TCP does not reach either is gone, not fallen back."""
        peer = pull.endpoint.instance_id
        if again.status in (PullStatus.DONE, PullStatus.MISMATCH):
            with self._lock:
                is_new = peer not in self._fallen
                self._fallen[peer] = None
                if len(self._fallen) > _MAX_PEERS:
                    del self._fallen[next(iter(self._fallen))]
            if is_new:
                self._post(TransportFallback(peer, self._transport, TCP, ended.message))
        self._finish(again, done)

    def _pull_second(self, pull: RankPull, done: PullDone) -> None:
        try:
            control = OneSidedAddress.decode(pull.endpoint.address).control
        except TransportError as error:
            done(PullEnded(ticket=pull.ticket, status=PullStatus.FAILED, message=error.message))
            return
        endpoint = dataclasses.replace(pull.endpoint, transport=TCP, address=control)
        self._second.pull(dataclasses.replace(pull, endpoint=endpoint), done)

    def _finish(self, ended: PullEnded, done: PullDone) -> None:
        with self._lock:
            self._under_way.pop(ended.ticket, None)
        done(ended)

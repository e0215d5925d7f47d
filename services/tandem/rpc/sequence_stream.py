"""What has arrived for one request of a session and has not been taken yet. Bounded; one producer, one consumer."""

from __future__ import annotations

from collections.abc import Callable

from tandem.core.messages.requests import Ended, Tokens
from tandem.errors import Overloaded, TandemError


class SequenceStream:
    """The session puts, the consumer takes when `notify` was called; all in one event loop, nothing blocks.

    A consumer that leaves more than `max_tokens` behind loses the request: `put` says so, `error` becomes Overloaded.
    """

    def __init__(self, max_tokens: int, notify: Callable[[], None]) -> None:
        self._max_tokens = max_tokens
        self._notify = notify
        self._arrived: list[Tokens] = []
        self._num_tokens = 0
        self.ended: Ended | None = None
        self.error: TandemError | None = None

    def put(self, tokens: Tokens) -> bool:
        """Add output; False if that is too much, and the request is to be aborted."""
        self._num_tokens += len(tokens.token_ids)
        if self._num_tokens > self._max_tokens:
            self._arrived.clear()
            self._num_tokens = 0
            self.fail(
                Overloaded(
                    f"the client has not read {self._max_tokens} tokens; its request was ended", reason="SLOW_CLIENT"
                )
            )
            return False
        self._arrived.append(tokens)
        self._notify()
        return True

    def end(self, ended: Ended) -> None:
        """The worker's last word; output that was put before stays to be taken."""
        self.ended = ended
        self._notify()

    def fail(self, error: TandemError) -> None:
        """There is no last word: the session or the consumer's bound broke the request off.

        Output that was put before a session broke stays to be taken; beyond the consumer's bound nothing does.
        """
        self.error = error
        self._notify()

    def take(self) -> list[Tokens]:
        """Return what has arrived since the last call."""
        arrived, self._arrived = self._arrived, []
        self._num_tokens = 0
        return arrived

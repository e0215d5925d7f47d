"""All answers of one request as one stream of deltas, whatever protocol the client speaks.

One consumer, no tasks: every sequence's stream wakes the same event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tandem.errors import DeadlineExceeded
from tandem.gateway.dispatch import Dispatcher
from tandem.gateway.prepared import Delta, Prepared
from tandem.gateway.resumption import ResumptionRules
from tandem.gateway.sequence import AnswerSequence
from tandem.gateway.tokenizer import Tokenizer

# The worker gives up a little before the client does, so that the client hears why.
MARGIN_SECONDS = 0.05
MARGIN_SHARE = 0.05


class Generation:
    """One request being answered; `deadline` is a time of the running loop's clock."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        rules: ResumptionRules,
        deadline: float,
        on_tokens: Callable[[int], None],
        on_resumed: Callable[[], None],
        whole: bool = False,
    ) -> None:
        """`whole`: one delta a sequence, at its end.

        `on_tokens(n)` is called as tokens arrive, `on_resumed()` when a sequence goes on at another worker.
        """
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline
        self._expired = False
        self._wakeup = asyncio.Event()
        self._sequences = [
            AnswerSequence(
                prepared,
                index,
                dispatcher=dispatcher,
                tokenizer=tokenizer,
                rules=rules,
                notify=self._wakeup.set,
                on_tokens=on_tokens,
                on_resumed=on_resumed,
                seconds_left=self._worker_seconds,
                whole=whole,
            )
            for index in range(prepared.num_sequences)
        ]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield new output until every sequence has finished; raises the error that ended one, and ends the others.

        However it is left - cancelled, closed, failed - nothing of the request goes on at the workers.
        """
        timer = self._loop.call_at(self._deadline, self._expire)
        try:
            for sequence in self._sequences:
                sequence.start()
            running = self._sequences
            while running:
                await self._wakeup.wait()
                self._wakeup.clear()
                if self._expired:
                    raise DeadlineExceeded("the deadline passed")
                for sequence in running:
                    delta = sequence.advance()
                    if delta is not None:
                        yield delta
                running = [sequence for sequence in running if not sequence.finished]
        finally:
            timer.cancel()
            self.abort()

    def abort(self) -> None:
        """End what is left on the workers now. Harmless once everything has ended."""
        for sequence in self._sequences:
            sequence.abort()

    def _expire(self) -> None:
        self._expired = True
        self.abort()
        self._wakeup.set()

    def _worker_seconds(self) -> float:
        left = max(0.0, self._deadline - self._loop.time())
        return left - min(MARGIN_SECONDS, MARGIN_SHARE * left)

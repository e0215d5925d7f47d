"""One answer on its way to the client: tokens become text, stop strings end it, a lost worker is replaced.

No task and no await: the session puts tokens into the stream, `advance` turns all that has arrived into one Delta.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tandem.core.messages.requests import Ended, EndReason, Tokens
from tandem.core.messages.sampling import TokenLogprob
from tandem.errors import NoWorker, Overloaded, TandemError, Unavailable
from tandem.gateway.answer_text import AnswerText
from tandem.gateway.dispatch import Assignment, Dispatcher
from tandem.gateway.journal import Journal
from tandem.gateway.prepared import Delta, Finish, FinishReason, Prepared
from tandem.gateway.tokenizer import Tokenizer
from tandem.rpc.convert import ended_error

MAX_DISPATCHES = 2
LAST_WORD_SECONDS = 2.0  # how long a worker has to say its last word after a stop string matched


class AnswerSequence:
    """Sequence `index` of a request. `start`, then `advance` after every `notify` until `finished`; `abort` at the end.

    `on_tokens(n)` is called for every arrival. With `whole` there is one Delta, at the end.
    """

    def __init__(
        self,
        prepared: Prepared,
        index: int,
        *,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        notify: Callable[[], None],
        on_tokens: Callable[[int], None],
        seconds_left: Callable[[], float],
        whole: bool,
    ) -> None:
        self.finished = False
        self._prepared = prepared
        self._index = index
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._notify = notify
        self._on_tokens = on_tokens
        self._seconds_left = seconds_left
        self._whole = whole
        self._dispatches = 0
        self._sent = False
        self._assignment: Assignment | None = None
        self._last_word: asyncio.TimerHandle | None = None
        self._reset()

    def _reset(self) -> None:
        self._journal = Journal()
        self._text = AnswerText(self._prepared, self._tokenizer)
        self._new_text: list[str] = []
        self._new_ids: list[int] = []
        self._new_logprobs: list[TokenLogprob] = []
        self._new_prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def start(self, failed: Assignment | None = None) -> None:
        """Dispatch; raises NoWorker, PeerLost, Overloaded."""
        self._dispatches += 1
        self._assignment = self._dispatcher.dispatch(
            self._prepared, self._index, self._notify, timeout_seconds=self._seconds_left(), failed=failed
        )

    def abort(self) -> None:
        """Cancel it on the worker, if it has not ended there."""
        self.finished = True
        if self._last_word is not None:
            self._last_word.cancel()
        if self._assignment is not None:
            self._assignment.end()

    def advance(self) -> Delta | None:
        """Return what is to be sent now, if anything; raises the member of the error tree that ended it."""
        if self.finished or self._assignment is None:
            return None
        stream = self._assignment.stream
        for tokens in stream.take():
            self._receive(tokens)
        finish: Finish | None = None
        if stream.error is not None and self._text.stop_string is None:
            self._fail(stream.error)
        elif stream.error is not None:
            finish = self._finish(Ended(request_id=0, reason=EndReason.STOP))
        elif stream.ended is not None:
            finish = self._end(stream.ended)
        return self._delta(finish)

    def _receive(self, tokens: Tokens) -> None:
        assert self._assignment is not None
        if self._text.stop_string is not None:
            return  # computed before the worker heard of the stop
        self._assignment.prefilled()
        if tokens.prompt_logprobs:
            self._new_prompt_logprobs = tokens.prompt_logprobs
        start = len(self._journal)
        known = self._journal.accept(tokens.first_index, tokens.token_ids)
        new = tokens.token_ids[known:]
        if not new:
            return
        text, used = self._text.push(new, start)
        self._new_text.append(text)
        self._new_ids.extend(new[:used])
        self._new_logprobs.extend(tokens.logprobs[known : known + used])
        self._on_tokens(used)
        if self._text.stop_string is not None:
            self._journal.cut(start + used)
            self._assignment.stop()
            self._last_word = asyncio.get_running_loop().call_later(LAST_WORD_SECONDS, self._assume_end)

    def _assume_end(self) -> None:
        assert self._assignment is not None
        if self._assignment.stream.ended is None:
            self._assignment.stream.end(Ended(request_id=0, reason=EndReason.STOP))

    def _end(self, ended: Ended) -> Finish | None:
        if self._text.stop_string is None:
            error = ended_error(ended)
            if error is not None:
                self._fail(error)
                return None
            if ended.prompt_logprobs:
                self._new_prompt_logprobs = ended.prompt_logprobs
            self._new_text.append(self._text.finish())
        return self._finish(ended)

    def _finish(self, ended: Ended) -> Finish:
        assert self._assignment is not None
        stop_string = self._text.stop_string
        stopped = stop_string is not None or ended.reason is EndReason.STOP
        return Finish(
            reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            stop_string=stop_string,
            stop_token_id=ended.stop_token_id if stop_string is None else None,
            prompt_tokens=len(self._prepared.prompt_token_ids),
            completion_tokens=len(self._journal),
            cached_tokens=ended.cached_tokens,
            timing=ended.timing,
            decode_worker=self._assignment.worker.address,
        )

    def _fail(self, error: TandemError) -> None:
        """Try another worker if the client has seen nothing yet, else raise."""
        assert self._assignment is not None
        failed = self._assignment
        failed.end()
        another_may_help = isinstance(error, Unavailable) or (
            isinstance(error, Overloaded) and failed.stream.error is None
        )
        if another_may_help and not self._sent and self._dispatches < MAX_DISPATCHES:
            self._reset()
            try:
                self.start(failed)
                return
            except NoWorker:
                pass  # the first error says more
        if isinstance(error, Unavailable):
            error.tokens_delivered = self._sent
        raise error

    def _delta(self, finish: Finish | None) -> Delta | None:
        output = self._prepared.output
        if finish is None:
            enough = len(self._new_ids) >= output.interval_tokens or not self._sent
            if self._whole or not enough or not self._visible():
                return None
        self._sent = True
        self.finished = finish is not None
        delta = Delta(
            index=self._index,
            num_tokens=len(self._new_ids),
            text="".join(self._new_text) if output.text else "",
            token_ids=tuple(self._new_ids) if output.token_ids else (),
            logprobs=tuple(self._new_logprobs),
            prompt_logprobs=self._new_prompt_logprobs,
            finish=finish,
        )
        self._new_text, self._new_ids, self._new_logprobs, self._new_prompt_logprobs = [], [], [], ()
        if finish is not None:
            self.abort()  # nothing is left of it, but its timer and ledger
        return delta

    def _visible(self) -> bool:
        output = self._prepared.output
        if (output.text and any(self._new_text)) or (output.token_ids and self._new_ids):
            return True
        return bool(self._new_logprobs or self._new_prompt_logprobs)

"""One answer on its way to the client: tokens become text, stop strings end it, a lost worker is replaced by another.

The journal and the text know nothing of workers: whoever goes on begins after the last token that has arrived here.

No task and no await: the session puts tokens into the stream, `advance` turns all that has arrived into one Delta.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from tandem.core.messages.requests import Ended, EndReason, Timing, Tokens
from tandem.core.messages.sampling import TokenLogprob
from tandem.errors import TandemError, Unavailable
from tandem.gateway.answer_text import AnswerText
from tandem.gateway.dispatch import Assignment, Dispatcher
from tandem.gateway.journal import Journal
from tandem.gateway.prepared import Delta, Finish, FinishReason, Prepared
from tandem.gateway.resumption import Cause, Resumption, ResumptionRules, cause_of
from tandem.gateway.tokenizer import Tokenizer
from tandem.rpc.convert import ended_error

LAST_WORD_SECONDS = 2.0  # how long a worker has to say its last word after a stop string matched


class AnswerSequence:
    """Sequence `index` of a request. `start`, then `advance` after every `notify` until `finished`; `abort` at the end.

    `on_tokens(n)` is called for every arrival, `on_resumed()` when it goes on at another worker. With `whole` there is
    one Delta, at the end.
    """

    def __init__(
        self,
        prepared: Prepared,
        index: int,
        *,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        rules: ResumptionRules,
        notify: Callable[[], None],
        on_tokens: Callable[[int], None],
        on_resumed: Callable[[], None],
        seconds_left: Callable[[], float],
        whole: bool,
    ) -> None:
        self.finished = False
        self._prepared = prepared
        self._index = index
        self._dispatcher = dispatcher
        self._notify = notify
        self._on_tokens = on_tokens
        self._on_resumed = on_resumed
        self._seconds_left = seconds_left
        self._whole = whole
        self._handoffs = dispatcher.new_handoffs()
        self._resumption = Resumption(
            rules, dispatch=self._dispatch, watch=dispatcher.watch, notify=notify, seconds_left=seconds_left
        )
        self._sent = False
        self._assignment: Assignment | None = None
        self._last_word: asyncio.TimerHandle | None = None
        self._journal = Journal()
        self._text = AnswerText(prepared, tokenizer)
        self._timing = Timing()  # of the workers that handed it back
        self._cached_tokens: int | None = None  # as the first worker that said so knew it
        self._new_text: list[str] = []
        self._new_ids: list[int] = []
        self._new_logprobs: list[TokenLogprob] = []
        self._new_prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def start(self) -> None:
        """Dispatch; raises NoWorker, PeerLost, Overloaded."""
        self._assignment = self._dispatch(frozenset())

    def _dispatch(self, excluded: frozenset[bytes]) -> Assignment:
        return self._dispatcher.dispatch(
            self._prepared,
            self._index,
            self._notify,
            timeout_seconds=self._seconds_left(),
            handoffs=self._handoffs,
            output=self._journal.token_ids,
            excluded=excluded,
        )

    def abort(self) -> None:
        """Cancel it on the worker, if it has not ended there."""
        self.finished = True
        self._resumption.cancel()
        if self._last_word is not None:
            self._last_word.cancel()
        if self._assignment is not None:
            self._assignment.end()

    def advance(self) -> Delta | None:
        """Return what is to be sent now, if anything; raises the member of the error tree that ended it."""
        if self.finished or self._assignment is None:
            return None
        if self._resumption.pending:
            self._resume()
            return None
        stream = self._assignment.stream
        for tokens in stream.take():
            self._receive(tokens)
        finish: Finish | None = None
        if self._text.stop_string is not None and (stream.error is not None or stream.ended is not None):
            finish = self._finish(stream.ended or Ended(request_id=0, reason=EndReason.STOP))
        elif stream.error is not None:
            finish = self._lose(stream.error, cause_of(stream.error, by_session=True))
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
        self._assignment.has_output = True
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
        error = ended_error(ended)
        if error is not None:
            self._account(ended)
            return self._lose(error, cause_of(error, by_session=False))
        if ended.prompt_logprobs:
            self._new_prompt_logprobs = ended.prompt_logprobs
        self._new_text.append(self._text.finish())
        return self._finish(ended)

    def _account(self, ended: Ended) -> None:
        """Add what a worker's last word says of its part; one that was lost has said nothing."""
        assert self._assignment is not None
        if self._cached_tokens is None and self._assignment.has_output:
            # Later workers find in their caches what was computed for this very answer.
            self._cached_tokens = ended.cached_tokens
        self._timing = _sum(self._timing, ended.timing)

    def _finish(self, ended: Ended) -> Finish:
        assert self._assignment is not None
        self._account(ended)
        stop_string = self._text.stop_string
        stopped = stop_string is not None or ended.reason is EndReason.STOP
        num_prompt = len(self._prepared.prompt_token_ids)
        return Finish(
            reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            stop_string=stop_string,
            stop_token_id=ended.stop_token_id if stop_string is None else None,
            prompt_tokens=num_prompt,
            completion_tokens=len(self._journal),
            # A resumed answer's own output may have been found in a cache as well.
            cached_tokens=min(ended.cached_tokens if self._cached_tokens is None else self._cached_tokens, num_prompt),
            timing=self._timing,
            decode_worker=self._assignment.worker.address,
        )

    def _lose(self, error: TandemError, cause: Cause | None) -> Finish | None:
        """The worker will not go on: finish if the answer is complete, else go on elsewhere, or raise."""
        assert self._assignment is not None
        self._assignment.end()
        if cause is None:
            raise error
        complete = self._complete()
        if complete is not None:
            return self._end(complete)
        waits = cause is not Cause.REFUSED or len(self._journal) > 0
        try:
            self._resumption.lose(error, cause, self._assignment.instance_id, waits=waits)
        except Unavailable as unavailable:
            unavailable.tokens_delivered = self._sent
            raise
        self._resume()
        return None

    def _resume(self) -> None:
        try:
            assignment = self._resumption.advance()
        except Unavailable as error:
            error.tokens_delivered = self._sent
            raise
        if assignment is not None:
            self._assignment = assignment
            self._on_resumed()

    def _complete(self) -> Ended | None:
        """Return the last word that the worker owed where the output itself has ended the answer."""
        output, sampling = self._journal.token_ids, self._prepared.sampling
        if not output:
            return None
        if len(output) > sampling.min_tokens and output[-1] in self._prepared.end_token_ids:
            return Ended(request_id=0, reason=EndReason.STOP, stop_token_id=output[-1])
        if len(output) >= sampling.max_tokens:
            return Ended(request_id=0, reason=EndReason.LENGTH)
        return None

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


def _sum(first: Timing, second: Timing) -> Timing:
    """Add seconds and bytes; of names, the later one."""
    total: dict[str, Any] = {}
    for field in fields(Timing):
        before, after = getattr(first, field.name), getattr(second, field.name)
        total[field.name] = after or before if isinstance(after, str) else before + after
    return Timing(**total)

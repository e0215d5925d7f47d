"""The text of one answer: detokenized, ended at a stop string, without the token that ended it."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.gateway.prepared import Prepared
from tandem.gateway.stops import StopMatcher
from tandem.gateway.tokenizer import Tokenizer


class AnswerText:
    """Turns output tokens into text to be shown. `stop_string` is the one that ended the answer."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer) -> None:
        output = prepared.output
        # Without text to show, stop strings still have to be found.
        needed = output.text or bool(prepared.stop_strings)
        self._detokenizer = tokenizer.detokenizer(skip_special=output.skip_special) if needed else None
        self._matcher = (
            StopMatcher(prepared.stop_strings, include=output.include_stop) if prepared.stop_strings else None
        )
        self._end_token_ids = prepared.end_token_ids
        self._min_tokens = prepared.sampling.min_tokens
        self._show_end = output.include_stop

    @property
    def stop_string(self) -> str | None:
        return self._matcher.matched if self._matcher is not None else None

    def push(self, token_ids: Sequence[int], start: int) -> tuple[str, int]:
        """Return (text to show, how many of the tokens belong to the answer); `start` is the index of the first one."""
        if self._detokenizer is None:
            return "", len(token_ids)
        if self._matcher is None and self._end_token_ids.isdisjoint(token_ids):
            return self._detokenizer.push(token_ids), len(token_ids)
        text: list[str] = []
        for used, token_id in enumerate(token_ids, start=1):
            hidden = not self._show_end and token_id in self._end_token_ids and start + used > self._min_tokens
            piece = "" if hidden else self._detokenizer.push((token_id,))
            text.append(piece if self._matcher is None else self._matcher.push(piece))
            if self.stop_string is not None:
                return "".join(text), used
        return "".join(text), len(token_ids)

    def finish(self) -> str:
        """The answer is over without a stop string: return what was held back."""
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.finish()
        if self._matcher is None:
            return text
        text = self._matcher.push(text)
        return text if self._matcher.matched is not None else text + self._matcher.finish()

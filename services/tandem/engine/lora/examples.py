"""A training's examples as token ids, and which of them the loss is of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from tandem.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, of which those from `first_target` (at least 1) on are to be predicted."""

    token_ids: tuple[int, ...]
    first_target: int

    @property
    def num_targets(self) -> int:
        return len(self.token_ids) - self.first_target


class ExampleEncoder:
    """Turns (prompt, completion) into an Example. A completion ends with EOS, where the model has one."""

    def __init__(self, folder: Path, eos_token_ids: Sequence[int], vocab_size: int, max_tokens: int) -> None:
        """Raises InvalidRequest if the model's folder has no tokenizer that can be used."""
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise InvalidRequest(f"the model's tokenizer.json cannot be used: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end = tuple(eos_token_ids[:1])
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens

    def encode(self, prompt: str, completion: str) -> Example | None:
        """Return the example, cut to the longest; None if nothing of it is left to learn."""
        begin = self._ids(prompt, special=True) if prompt else ()
        rest = self._ids(completion, special=not prompt)
        if self._end and rest[-1:] != self._end:
            rest += self._end
        token_ids = (begin + rest)[: self._max_tokens]
        example = Example(token_ids, max(1, len(begin)))
        return example if example.num_targets > 0 else None

    def encode_all(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Example | None]:
        """Encode one after another, so that others can have the device in between."""
        for prompt, completion in pairs:
            yield self.encode(prompt, completion)

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if any(token >= self._vocab_size for token in ids):
            raise InvalidRequest("the tokenizer has tokens that the model has not")
        return ids

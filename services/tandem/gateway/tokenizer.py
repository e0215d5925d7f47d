"""Text to token ids and back for one model: the `tokenizers` library, a bounded pool of threads, the chat templates.

Encoding runs in the pool, through encode_batch, which releases the GIL: a long prompt must not stall running streams.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import tokenizers

from tandem.errors import ConfigError
from tandem.gateway.chat_template import ChatTemplates
from tandem.gateway.detokenizer import Detokenizer, detokenizer
from tandem.gateway.model_files import ModelFiles
from tandem.gateway.pieces import Pieces, pieces_of

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_THREADS = 4
_T = TypeVar("_T")


class Tokenizer:
    """One model's tokenizer. `close` it. Everything but `encode` and `encode_chat` is quick and stays in the caller."""

    def __init__(self, files: ModelFiles) -> None:
        """Raises ConfigError if tokenizer.json or the chat template cannot be used."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(files.tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"model.path: tokenizer.json of {files.folder} cannot be used: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pieces: Pieces = pieces_of(self._tokenizer, files.tokenizer.get("decoder"))
        self.chat_templates = ChatTemplates(files.chat_templates, _special_tokens(files))
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="tokenizer")

    @property
    def vocab_size(self) -> int:
        """Ids that have a token; a model's vocabulary may be padded beyond."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`, with what the model expects around a text if asked for."""
        return await self._in_pool(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        continue_final_message: bool,
    ) -> tuple[str, list[int]]:
        """Return the prompt text of a chat and its ids; templates bring their own special tokens."""

        def work() -> tuple[str, list[int]]:
            text = self.chat_templates.render(
                messages, tools=tools, arguments=arguments, continue_final_message=continue_final_message
            )
            return text, self._encode(text, False)

        return await self._in_pool(work)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """Return the text of `token_ids`; ids without a token have none."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def detokenizer(self, *, skip_special: bool) -> Detokenizer:
        """Start the text of a new answer."""
        return detokenizer(self._pieces, skip_special=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for; bytes, since it may be a part of a character."""
        return self._pieces.token_bytes(token_id)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _special_tokens(files: ModelFiles) -> dict[str, str]:
    """The named special tokens; each is a string or an object with its content."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        token = files.tokenizer_config.get(name) or files.special_tokens.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found

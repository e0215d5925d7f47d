"""Token ids to text, as they come. The deltas of one answer add up to exactly what decoding all of its ids gives.

A delta never ends inside a character. Each step looks at the new ids and a bounded number before them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from tandem.gateway.pieces import BytePieces, Pieces, TextPieces, UnknownPieces

REPLACEMENT = "\ufffd"
MAX_BYTE_RUN = 64
WINDOW_IDS = 8


class Detokenizer(Protocol):
    """The text of one answer so far."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that these ids complete, maybe none."""

    def finish(self) -> str:
        """Return what was held back; nothing follows."""


def detokenizer(pieces: Pieces, *, skip_special: bool) -> Detokenizer:
    """Start a new text."""
    match pieces:
        case BytePieces():
            return ByteDetokenizer(pieces, skip_special)
        case TextPieces():
            return TextDetokenizer(pieces, skip_special)
        case UnknownPieces():
            return WindowDetokenizer(pieces, skip_special)


class ByteDetokenizer:
    """Byte-level tokenizers: an incremental UTF-8 decoder over a table of bytes."""

    def __init__(self, pieces: BytePieces, skip_special: bool) -> None:
        self._pieces = pieces
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        bytes_of, skip = self._pieces.bytes_of, self._skip_special
        return self._decoder.decode(b"".join([bytes_of(token_id, skip_special=skip) for token_id in token_ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class TextDetokenizer:
    """SentencePiece-like tokenizers, with runs of byte tokens.

    Such a run is text if all of it is valid UTF-8, else one replacement character a byte: it is held back until it
    ends. After MAX_BYTE_RUN bytes its complete characters go out, and the rest counts as a run of its own.
    """

    def __init__(self, pieces: TextPieces, skip_special: bool) -> None:
        self._pieces = pieces
        self._skip_special = skip_special
        self._first = True
        self._run = bytearray()
        self._strips_left = pieces.rules.strip_count

    def push(self, token_ids: Iterable[int]) -> str:
        text: list[str] = []
        for token_id in token_ids:
            piece = self._pieces.piece(token_id, first=self._first, skip_special=self._skip_special)
            if piece is None:
                continue
            self._first = False
            if isinstance(piece, int):
                self._run.append(piece)
                if len(self._run) > MAX_BYTE_RUN:
                    text.append(self._release())
            else:
                text.append(self._end_run())
                text.append(piece)
        return self._strip("".join(text))

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _release(self) -> str:
        try:
            return self._end_run() if self._run.decode() else ""
        except UnicodeDecodeError as error:
            if error.end < len(self._run) or error.reason != "unexpected end of data":
                return self._end_run()
            text = self._run[: error.start].decode()
            del self._run[: error.start]
            return text

    def _strip(self, text: str) -> str:
        while self._strips_left and text:
            if not text.startswith(self._pieces.rules.strip):
                self._strips_left = 0
                break
            text = text[len(self._pieces.rules.strip) :]
            self._strips_left -= 1
        return text


class WindowDetokenizer:
    """Any tokenizer: decode the ids that gave the last delta without and with the new ones; the difference is new.

    Such a window starts between characters. Exact where a token's text depends on nothing before the window; what looks
    like a part of a character is held back for at most WINDOW_IDS tokens.
    """

    def __init__(self, pieces: UnknownPieces, skip_special: bool) -> None:
        self._tokenizer = pieces.tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._pending: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._emit(self._difference())

    def _push(self, token_id: int) -> str:
        self._pending.append(token_id)
        difference = self._difference()
        if difference.endswith(REPLACEMENT) and len(self._pending) < WINDOW_IDS:
            return ""  # probably inside a character
        return self._emit(difference)

    def _difference(self) -> str:
        before = self._decode(self._window)
        return self._decode(self._window + self._pending).removeprefix(before)

    def _emit(self, text: str) -> str:
        if text:
            self._window = self._pending
        self._pending = []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
        return text

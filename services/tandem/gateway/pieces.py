"""What each token id contributes to a text, read off a tokenizer once: the tables under `detokenizer`.

A `Pieces` follows the tokenizer's own decoder. Byte-level ones are a table of bytes; SentencePiece-like ones a table of
strings and single bytes, plus rules for the start of the text; every other decoder is asked itself (`Unknown`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: printable Latin-1 as is, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class Vocabulary:
    """Token strings by id, and which of them are special."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}
        self._tokenizer = tokenizer

    def token(self, token_id: int) -> str | None:
        """The token's string; None for an id that the tokenizer does not have (vocabularies are padded)."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def is_special(self, token_id: int) -> bool:
        return self.token(token_id) in self._special


class BytePieces:
    """Byte-level decoders: a text is the concatenated bytes of its tokens, read as UTF-8."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._all: dict[int, bytes] = {}
        self._visible: dict[int, bytes] = {}

    def bytes_of(self, token_id: int, *, skip_special: bool) -> bytes:
        """The bytes of a token, none for one that is skipped or not known."""
        table = self._visible if skip_special else self._all
        found = table.get(token_id)
        if found is None:
            skipped = skip_special and self.vocabulary.is_special(token_id)
            found = table[token_id] = b"" if skipped else self._convert(token_id)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        return self.bytes_of(token_id, skip_special=False)

    def _convert(self, token_id: int) -> bytes:
        token = self.vocabulary.token(token_id) or ""
        try:
            return bytes([_ALPHABET[character] for character in token])
        except KeyError:  # an added token that is not written in the alphabet stands for itself
            return token.encode()


@dataclass(frozen=True, slots=True)
class TextRules:
    """A SentencePiece-like decoder: what is done to each token, and to the start of the text."""

    replacements: tuple[tuple[str, str], ...] = ()
    first_removals: tuple[str, ...] = ()  # removed from the first token, before the replacements
    byte_fallback: bool = False  # <0x41> is the byte 0x41
    strip: str = ""
    strip_count: int = 0  # up to so many `strip` are removed from the start of the text
    separator: str = ""  # between tokens


@dataclass(slots=True)
class TextPieces:
    """SentencePiece-like decoders: a text is its tokens' strings, runs of byte tokens read as UTF-8."""

    vocabulary: Vocabulary
    rules: TextRules
    _pieces: dict[int, str | int | None] = field(default_factory=dict)

    def piece(self, token_id: int, *, first: bool, skip_special: bool) -> str | int | None:
        """A string, or a byte as a number; None for a token that is skipped or not known."""
        key = token_id << 2 | first << 1 | skip_special
        if key not in self._pieces:
            self._pieces[key] = self._convert(token_id, first, skip_special)
        return self._pieces[key]

    def token_bytes(self, token_id: int) -> bytes:
        piece = self.piece(token_id, first=False, skip_special=False)
        return bytes([piece]) if isinstance(piece, int) else (piece or "").encode()

    def _convert(self, token_id: int, first: bool, skip_special: bool) -> str | int | None:
        token = self.vocabulary.token(token_id)
        if token is None or (skip_special and self.vocabulary.is_special(token_id)):
            return None
        for removed in self.rules.first_removals if first else ():
            token = token.replace(removed, "")
        for old, new in self.rules.replacements:
            token = token.replace(old, new)
        if self.rules.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                pass  # looks like a byte, is none: stands for itself
        return token if first else self.rules.separator + token


@dataclass(frozen=True, slots=True)
class UnknownPieces:
    """Any other decoder: the tokenizer is asked."""

    tokenizer: Tokenizer

    def token_bytes(self, token_id: int) -> bytes:
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


Pieces = BytePieces | TextPieces | UnknownPieces


def pieces_of(tokenizer: Tokenizer, decoder: dict[str, Any] | None) -> Pieces:
    """Return the tables of `tokenizer`, whose `decoder` is that entry of its tokenizer.json."""
    vocabulary = Vocabulary(tokenizer)
    if decoder is None:
        return TextPieces(vocabulary, TextRules(separator=" "))
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return BytePieces(vocabulary)
    rules = _text_rules(steps)
    return TextPieces(vocabulary, rules) if rules is not None else UnknownPieces(tokenizer)


def _text_rules(steps: list[dict[str, Any]]) -> TextRules | None:
    """Return the rules of (Replace | Metaspace)* ByteFallback? (Fuse Strip?)?, None for any other sequence."""
    replacements: list[tuple[str, str]] = []
    removals: list[str] = []
    rest = list(steps)
    while rest and rest[0]["type"] in ("Replace", "Metaspace"):
        step = rest.pop(0)
        if step["type"] == "Metaspace":
            if replacements:
                return None  # the order of removal and replacement would matter
            if step.get("prepend_scheme", "always") != "never":
                removals.append(step["replacement"])
            replacements.append((step["replacement"], " "))
        elif "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        else:
            return None
    byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
    rest = rest[byte_fallback:]
    strip: dict[str, Any] = {}
    if rest and rest[0]["type"] == "Fuse":
        rest.pop(0)
        if rest and rest[0]["type"] == "Strip" and not rest[0]["stop"]:
            strip = rest.pop(0)
    if rest:
        return None
    return TextRules(
        tuple(replacements), tuple(removals), byte_fallback, strip.get("content", ""), strip.get("start", 0)
    )

"""Tokenizers of every family that the detokenizer knows, built here: byte-level, SentencePiece-like, others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

TEXT = [
    "def main(argument):\n    return argument + 1",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, süß, 東京 の 天気, 😀👩‍👩‍👧 and €5",
] * 5
WORDS = ["▁the", "▁a", "▁", "he", "llo", "▁wor", "ld", "x", "é", "東", " ", "  ", "▁▁", "a▁b", "<0xZZ>"]


@cache
def made(kind: str) -> Tokenizer:
    """The tokenizer of a family, by name."""
    makers: dict[str, Callable[[], Tokenizer]] = {
        "byte_level": _byte_level,
        "llama": lambda: _sentence_piece(_llama_decoder()),
        "gemma": lambda: _sentence_piece(_gemma_decoder()),
        "metaspace": lambda: _sentence_piece(decoders.Metaspace()),
        "metaspace_never": lambda: _sentence_piece(decoders.Metaspace(prepend_scheme="never")),
        "metaspace_bytes": lambda: _sentence_piece(
            decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        ),
        "plain": lambda: _sentence_piece(None),
        "word_piece": _word_piece,
        "regex_replace": lambda: _sentence_piece(
            decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.ByteFallback(), decoders.Fuse()])
        ),
    }
    return makers[kind]()


def token_id(kind: str, token: str) -> int:
    """The id of a token that is there."""
    found = made(kind).token_to_id(token)
    assert found is not None
    return int(found)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|spécial token|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("not special", special=False), AddedToken("ĠÃ¤", special=False)])
    return tokenizer


def _sentence_piece(decoder: Any) -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *WORDS]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("plain▁added", special=False)])
    return tokenizer


def _llama_decoder() -> Any:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _gemma_decoder() -> Any:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _word_piece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "##s", "dog", "##gy", ".", ",", "do", "n", "'", "t", "é", "##é"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("[CLS]", "[SEP]")])
    return tokenizer

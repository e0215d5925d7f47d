"""Deltas add up to what decoding all ids at once gives, for every family of tokenizers, however the ids arrive."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tandem.gateway.detokenizer import MAX_BYTE_RUN, Detokenizer, detokenizer
from tandem.gateway.pieces import BytePieces, Pieces, TextPieces, UnknownPieces, pieces_of
from tests.gateway.tokenizers_made import made, token_id

EXACT = ["byte_level", "llama", "gemma", "metaspace", "metaspace_never", "metaspace_bytes", "plain", "word_piece"]
FAMILIES = {
    "byte_level": BytePieces,
    "llama": TextPieces,
    "gemma": TextPieces,
    "metaspace": TextPieces,
    "metaspace_never": TextPieces,
    "metaspace_bytes": TextPieces,
    "plain": TextPieces,
    "word_piece": UnknownPieces,
    "regex_replace": UnknownPieces,
}


@cache
def pieces(kind: str) -> Pieces:
    tokenizer = made(kind)
    return pieces_of(tokenizer, json.loads(tokenizer.to_str())["decoder"])


def streamed(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> str:
    """The text of ids that arrive in runs of the lengths `cuts`, then the rest."""
    text, start = "", 0
    for length in [*cuts, len(ids)]:
        text += detokenizer.push(ids[start : start + length])
        start += length
    return text + detokenizer.finish()


@pytest.mark.parametrize("kind", FAMILIES)
def test_decoders_are_recognised(kind: str) -> None:
    assert type(pieces(kind)) is FAMILIES[kind]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=300)
@given(data=st.data(), skip_special=st.booleans())
def test_random_ids(kind: str, data: st.DataObject, skip_special: bool) -> None:
    tokenizer = made(kind)
    past_the_end = tokenizer.get_vocab_size() + 2  # models pad their vocabularies
    ids = data.draw(st.lists(st.integers(0, past_the_end), max_size=MAX_BYTE_RUN))
    cuts = data.draw(st.lists(st.integers(0, 4), max_size=20))
    expected = tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert streamed(detokenizer(pieces(kind), skip_special=skip_special), ids, cuts) == expected


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "metaspace_bytes", "regex_replace"])
@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_any_text_one_token_at_a_time(kind: str, text: str) -> None:
    tokenizer: Tokenizer = made(kind)
    ids = tokenizer.encode(text).ids
    stream = detokenizer(pieces(kind), skip_special=True)
    deltas = [stream.push([one]) for one in ids] + [stream.finish()]
    assert "".join(deltas) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=100)
@given(text=st.text(max_size=60), data=st.data())
def test_the_demo_model(text: str, data: st.DataObject) -> None:
    tokenizer, table = demo()
    ids = tokenizer.encode(text).ids + data.draw(st.lists(st.integers(0, 4095), max_size=20))
    assert streamed(detokenizer(table, skip_special=True), ids, [1] * 30) == tokenizer.decode(ids)


@cache
def demo() -> tuple[Tokenizer, Pieces]:
    from tandem.demo import model_path

    path = model_path() / "tokenizer.json"
    if not path.exists():
        pytest.skip("the demo model is not there")
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer, pieces_of(tokenizer, json.loads(path.read_text())["decoder"])


def test_a_long_run_of_byte_tokens_goes_out_in_time() -> None:
    text = "€" * 100
    ids = [token_id("llama", f"<0x{value:02X}>") for value in text.encode()]
    stream = detokenizer(pieces("llama"), skip_special=True)
    deltas = [stream.push([one]) for one in ids]
    longest_wait = max(len(part) for part in "".join("x" if delta else "." for delta in deltas).split("x"))
    assert longest_wait <= MAX_BYTE_RUN
    assert "".join(deltas) + stream.finish() == text


def test_a_long_run_of_invalid_bytes_is_replaced() -> None:
    tokenizer = made("llama")
    ids = [token_id("llama", "<0xFF>")] * 300
    stream = detokenizer(pieces("llama"), skip_special=True)
    assert streamed(stream, ids, [1] * 300) == "\ufffd" * 300 == tokenizer.decode(ids)


def test_token_bytes() -> None:
    table, tokenizer = pieces("byte_level"), made("byte_level")
    assert b"".join(table.token_bytes(one) for one in tokenizer.encode("é€x y").ids) == "é€x y".encode()
    assert table.token_bytes(0) == b"<|end|>"
    assert pieces("llama").token_bytes(token_id("llama", "<0xE2>")) == b"\xe2"
    assert pieces("llama").token_bytes(token_id("llama", "▁the")) == b" the"
    assert pieces("word_piece").token_bytes(token_id("word_piece", "dog")) == b"dog"
    assert pieces("byte_level").token_bytes(10**6) == b""

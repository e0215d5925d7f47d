"""Stop strings: found wherever the text is cut, never leaked, nothing else held back for good."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.gateway.stops import StopMatcher


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: read up to the first character that completes a stop string; the longest one wins."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=2000)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 5), max_size=20),
    include=st.booleans(),
)
def test_any_text_in_any_pieces(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include=include)
    shown, start = "", 0
    for length in [*cuts, len(text)]:
        shown += matcher.push(text[start : start + length])
        start += length
        whole, stop = expected(text, stops, include)
        assert whole.startswith(shown)  # nothing leaked that is taken back later
    if matcher.matched is None:
        shown += matcher.finish()
    assert (shown, matcher.matched) == (whole, stop)


def test_only_the_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["<end>"], include=False)
    assert [matcher.push(piece) for piece in ("a<", "e", "x", "<<en", "d")] == ["a", "", "<ex", "<", ""]
    assert matcher.finish() == "<end"


@pytest.mark.parametrize("stop", ["a" * 256, "a" * 255 + "b"])
def test_adversarial_strings_cost_steps_not_squares(stop: str) -> None:
    import time

    matcher = StopMatcher([stop[i:] for i in range(32)], include=False)
    text = ("a" * 200 + "c") * 100
    started = time.thread_time()
    assert len("".join(matcher.push(character) for character in text) + matcher.finish()) == len(text)
    assert time.thread_time() - started < 5

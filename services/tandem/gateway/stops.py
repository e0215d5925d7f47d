"""Stop strings in a text that arrives in pieces: never leaked, wherever the pieces are cut.

The result is that of reading character by character: the stop string that is complete first wins, of those complete at
the same character the longest. Cost is a few steps a character and stop string, whatever the strings are.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Progress:
    """How much of one stop string the end of the text is (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._fallback = [0] * len(stop)  # [i]: longest proper beginning of stop[: i + 1] that also ends it
        for i in range(1, len(stop)):
            length = self._fallback[i - 1]
            while length and stop[i] != stop[length]:
                length = self._fallback[length - 1]
            self._fallback[i] = length + (stop[i] == stop[length])

    def advance(self, character: str) -> bool:
        """Read a character; whether the stop string is complete now, after which nothing may follow."""
        while self.length and character != self.stop[self.length]:
            self.length = self._fallback[self.length - 1]
        self.length += character == self.stop[self.length]
        return self.length == len(self.stop)


class StopMatcher:
    """Holds back what may become a stop string. `matched` is the stop string found; then nothing more is taken."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        """`stops` are not empty; with `include` the stop string itself is part of the text."""
        self._progress = [_Progress(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return what can be passed on: everything before a stop string, or before what may be the start of one."""
        if self.matched is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        held = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [progress.stop for progress in self._progress if progress.advance(character)]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return held[:end] if self._include else held[: end - len(self.matched)]
        num_held = max(progress.length for progress in self._progress)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def finish(self) -> str:
        """The text is over: return what was held back."""
        held, self._held = self._held, ""
        return held

"""The state table is the picture of docs/architecture.md section 6, and nothing else moves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tandem.core.states import State, move, transitions

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
_ARROW = re.compile(r"^ {4}((?:[A-Z_, ]+|\(-> EXTENDING\)\*|any)(?: -> [A-Z_]+| \(-> EXTENDING\)\*)+)", re.MULTILINE)


@dataclass
class Subject:
    state: State
    request_id: int = 1


def pictured() -> dict[State, set[State]]:
    """Read the arrows out of the page's drawing."""
    text = DOCUMENT.read_text()
    section = text[text.index("## 6. ") : text.index("## 7. ")]
    table: dict[State, set[State]] = {state: set() for state in State}
    for match in _ARROW.finditer(section):
        steps = match.group(1).replace("(-> EXTENDING)*", "-> EXTENDING").split(" -> ")
        for left, right in pairwise(steps):
            sources = [s for s in State if s is not State.FINISHED] if left == "any" else named(left)
            for source in sources:
                table[source].add(State[right.strip()])
    return table


def named(text: str) -> list[State]:
    return [State[name.strip()] for name in text.split(",")]


def test_the_table_is_the_picture() -> None:
    table = {state: set(targets) for state, targets in transitions().items()}
    # A further attempt while nothing was received yet; the picture has no loops of a state to itself but EXTENDING's.
    table[State.AWAITING].discard(State.AWAITING)
    assert pictured() == table


@pytest.mark.parametrize("source", list(State))
@pytest.mark.parametrize("target", list(State))
def test_only_the_table_moves(source: State, target: State) -> None:
    subject = Subject(source)
    if target in transitions()[source]:
        move(subject, target)
        assert subject.state is target
    else:
        with pytest.raises(AssertionError, match="is not a transition"):
            move(subject, target)
        assert subject.state is source


def test_nothing_leaves_the_end() -> None:
    assert transitions()[State.FINISHED] == frozenset()
    assert all(State.FINISHED in targets for state, targets in transitions().items() if state is not State.FINISHED)


def test_only_move_assigns_a_state() -> None:
    core = Path(__file__).resolve().parents[2] / "services" / "tandem" / "core"
    assigning = [path.name for path in core.rglob("*.py") if re.search(r"\.state = (?!.*state is)", path.read_text())]
    assert assigning == ["states.py"]

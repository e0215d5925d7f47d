"""The life of a request as one table. This file alone says which transitions exist; `move` alone assigns a state.

    AWAITING -> RECEIVING -> DECODING -> FINISHED                     with a prefill peer
    WAITING -> EXTENDING (-> EXTENDING)* -> DECODING -> FINISHED      unified, or decode computing the prompt itself
    WAITING -> EXTENDING (-> EXTENDING)* -> HANDING_OFF -> FINISHED   prefill

An illegal transition is a bug and raises AssertionError. It knows nothing about roles: the entry state and the state
after the prompt are data of `core.roles`.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class State(Enum):
    AWAITING = "awaiting"  # named a prefill peer; pins at most its held prefix (revocable)
    RECEIVING = "receiving"  # has all pages of its prompt; they are being pulled
    WAITING = "waiting"  # for pages and a slot, to be computed here
    EXTENDING = "extending"  # known tokens are being computed
    DECODING = "decoding"  # one token after the other
    HANDING_OFF = "handing_off"  # prefill: computed, first token known, not released yet
    FINISHED = "finished"


_TRANSITIONS: dict[State, frozenset[State]] = {
    # to AWAITING again: an attempt that is not the first; to WAITING: every named peer failed
    State.AWAITING: frozenset({State.AWAITING, State.RECEIVING, State.WAITING, State.FINISHED}),
    # to EXTENDING: a resumed request, whose output beyond the first Open's is extended here
    State.RECEIVING: frozenset({State.AWAITING, State.WAITING, State.EXTENDING, State.DECODING, State.FINISHED}),
    State.WAITING: frozenset({State.EXTENDING, State.FINISHED}),
    State.EXTENDING: frozenset({State.EXTENDING, State.DECODING, State.HANDING_OFF, State.FINISHED}),
    # to WAITING: retracted for lack of pages
    State.DECODING: frozenset({State.WAITING, State.FINISHED}),
    State.HANDING_OFF: frozenset({State.FINISHED}),
    State.FINISHED: frozenset(),
}


class HasState(Protocol):
    state: State
    request_id: int


def move(subject: HasState, target: State) -> None:
    """Assign `target`; the only assignment of a request's state after its entry."""
    allowed = _TRANSITIONS[subject.state]
    assert target in allowed, f"request {subject.request_id}: {subject.state.name} -> {target.name} is not a transition"
    subject.state = target


def transitions() -> dict[State, frozenset[State]]:
    """Return the table, for tests and documentation."""
    return dict(_TRANSITIONS)

"""Six loops out of two pacings and three roles, as in the table of docs/architecture.md section 4."""

from __future__ import annotations

from typing import get_args

import pytest

from tandem.config import LoopName, Role
from tandem.core.roles import ROLES, all_loops, select_loop
from tandem.core.states import State

TABLE = {
    "normal": ("unified", 0, 1),
    "overlap": ("unified", 1, 2),
    "normal_prefill": ("prefill", 0, 1),
    "overlap_prefill": ("prefill", 1, 2),
    "normal_decode": ("decode", 0, 1),
    "overlap_decode": ("decode", 1, 2),
}


def test_the_loops_are_the_table() -> None:
    assert {loop.name: (loop.role, loop.depth, loop.chain) for loop in all_loops()} == TABLE


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("pacing", get_args(LoopName))
def test_selection_is_a_row_of_the_table(role: Role, pacing: LoopName) -> None:
    loop = select_loop(role, pacing)
    assert TABLE[loop.name] == (role, loop.depth, loop.chain)
    assert loop.name.startswith(pacing)


def test_only_prefill_hands_off_and_only_decode_imports() -> None:
    assert {role for role, traits in ROLES.items() if traits.after_prompt is State.HANDING_OFF} == {"prefill"}
    assert {role for role, traits in ROLES.items() if traits.exports} == {"prefill"}
    assert {role for role, traits in ROLES.items() if traits.takes_peers} == {"decode"}

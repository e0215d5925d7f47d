"""Nine loops out of three pacings and three roles, as in the table of docs/architecture.md section 4."""

from __future__ import annotations

from typing import get_args

import pytest

from tandem.config import LoopName, Role
from tandem.config_load import load
from tandem.core.roles import PACINGS, ROLES, Pacing, all_loops, loop_of, select_loop
from tandem.core.states import State
from tandem.errors import ConfigError

STAGES = 4
TABLE = {
    "normal": ("unified", 0, 1, 1),
    "overlap": ("unified", 1, 2, 1),
    "pipelined": ("unified", 3, 1, STAGES),
    "normal_prefill": ("prefill", 0, 1, 1),
    "overlap_prefill": ("prefill", 1, 2, 1),
    "pipelined_prefill": ("prefill", 3, 1, STAGES),
    "normal_decode": ("decode", 0, 1, 1),
    "overlap_decode": ("decode", 1, 2, 1),
    "pipelined_decode": ("decode", 3, 1, STAGES),
}


def test_the_loops_are_the_table() -> None:
    found = {loop.name: (loop.role, loop.depth, loop.chain, loop.stages) for loop in all_loops(STAGES)}
    assert found == TABLE and list(found) == list(TABLE)


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("pacing", PACINGS)
def test_a_cell_is_named_by_its_pacing_and_its_role(role: Role, pacing: Pacing) -> None:
    loop = loop_of(role, pacing, STAGES)
    assert TABLE[loop.name] == (role, loop.depth, loop.chain, loop.stages)
    assert loop.name == pacing + ("" if role == "unified" else f"_{role}")


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize(
    ("loop", "stages", "pacing", "why"),
    [
        ("auto", 1, "overlap", "scheduler.loop is auto"),
        ("overlap", 1, "overlap", "scheduler.loop is overlap"),
        ("normal", 1, "normal", "overlap is off"),
        ("auto", 2, "pipelined", "parallel.pipeline_size is 2"),
        ("normal", 4, "pipelined", "parallel.pipeline_size is 4"),
    ],
)
def test_stages_come_first_then_overlap(role: Role, loop: LoopName, stages: int, pacing: Pacing, why: str) -> None:
    selection = select_loop(role, loop, stages)
    assert selection.loop == loop_of(role, pacing, stages)
    assert why in selection.reason


@pytest.mark.parametrize("role", get_args(Role))
def test_overlap_by_hand_with_stages_is_refused(role: Role) -> None:
    flags = ["--scheduler.loop", "overlap", "--parallel.pipeline-size"]
    assert load(role, [*flags, "1"], {}).scheduler.loop == "overlap"
    with pytest.raises(ConfigError, match=r"scheduler\.loop: overlap .*parallel\.pipeline_size 2"):
        load(role, [*flags, "2"], {})


def test_only_prefill_hands_off_and_only_decode_imports() -> None:
    assert {role for role, traits in ROLES.items() if traits.after_prompt is State.HANDING_OFF} == {"prefill"}
    assert {role for role, traits in ROLES.items() if traits.exports} == {"prefill"}
    assert {role for role, traits in ROLES.items() if traits.takes_peers} == {"decode"}

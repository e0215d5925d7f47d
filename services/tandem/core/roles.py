"""Roles and pacings as data, and the event loops that they span. There is one loop function; these are its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.config import LoopName, Role
from tandem.core.states import State


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleTraits:
    """What a role changes in the scheduler.

    `after_prompt` is the state of a request whose known tokens are computed. `takes_peers`: hand-offs are imported.
    `exports`: hand-offs are exported; requests arrive as Open, not as Submit.
    """

    after_prompt: State
    takes_peers: bool
    exports: bool


ROLES: dict[Role, RoleTraits] = {
    "prefill": RoleTraits(after_prompt=State.HANDING_OFF, takes_peers=False, exports=True),
    "decode": RoleTraits(after_prompt=State.DECODING, takes_peers=True, exports=False),
    "unified": RoleTraits(after_prompt=State.DECODING, takes_peers=False, exports=False),
}


Pacing = Literal["normal", "overlap", "pipelined"]
PACINGS: tuple[Pacing, ...] = ("normal", "overlap", "pipelined")
LOOP_ROLES: tuple[Role, ...] = ("unified", "prefill", "decode")  # in the order of the documentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """One event loop.

    `depth`: launched plans that may be unresolved while the next one is planned. `chain`: plans of one decoding
    request that may be in flight; 2 needs a device that keeps the last sampled token. `stages`: parts of the device
    that compute different plans at once; with more than one, each plan takes its share of the rows only.
    """

    name: str
    role: Role
    pacing: Pacing
    depth: int
    chain: int
    stages: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The loop of a worker, and why it is this one."""

    loop: Loop
    reason: str


def loop_of(role: Role, pacing: Pacing, stages: int = 1) -> Loop:
    """Return a cell of the table. `stages` counts for `pipelined` only."""
    name = pacing if role == "unified" else f"{pacing}_{role}"
    if pacing == "overlap":
        return Loop(name=name, role=role, pacing=pacing, depth=1, chain=2)
    if pacing == "pipelined":
        return Loop(name=name, role=role, pacing=pacing, depth=stages - 1, chain=1, stages=stages)
    return Loop(name=name, role=role, pacing=pacing, depth=0, chain=1)


def select_loop(role: Role, loop: LoopName, stages: int = 1) -> Selection:
    """Pick the loop of a worker: stages first, then overlap unless it is off; the role picks the row.

    `loop: overlap` with several stages is refused where the configuration is loaded.
    """
    if stages > 1:
        pacing: Pacing = "pipelined"
        reason = f"parallel.pipeline_size is {stages}: every stage has a plan"
    elif loop == "normal":
        pacing, reason = "normal", "scheduler.loop is normal: overlap is off"
    else:
        pacing, reason = "overlap", f"parallel.pipeline_size is 1, and scheduler.loop is {loop}"
    return Selection(loop=loop_of(role, pacing, stages), reason=reason)


def all_loops(stages: int) -> list[Loop]:
    """Return every loop, in the order of the documentation; the pipelined ones over `stages`."""
    return [loop_of(role, pacing, stages) for role in LOOP_ROLES for pacing in PACINGS]

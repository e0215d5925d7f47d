"""Roles and pacings as data, and the event loops that they span. There is one loop function; these are its rows."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """One event loop.

    `depth`: launched plans that may be unresolved while the next one is planned. `chain`: plans of one decoding
    request that may be in flight; 2 needs a device that keeps the last sampled token.
    """

    name: str
    role: Role
    depth: int
    chain: int


def select_loop(role: Role, loop: LoopName) -> Loop:
    """Pick the loop of a worker: the pacing by `loop`, the row by `role`."""
    name = loop if role == "unified" else f"{loop}_{role}"
    if loop == "overlap":
        return Loop(name=name, role=role, depth=1, chain=2)
    return Loop(name=name, role=role, depth=0, chain=1)


def all_loops() -> list[Loop]:
    """Return every loop that can be selected, in the order of the documentation."""
    pacings: tuple[LoopName, ...] = ("normal", "overlap")
    roles: tuple[Role, ...] = ("unified", "prefill", "decode")
    return [select_loop(role, pacing) for role in roles for pacing in pacings]

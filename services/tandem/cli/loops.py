"""`tandem loops`: all event loops as a table, and which of them a configuration selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from tandem.config import Config, Role
from tandem.config_load import load
from tandem.core.roles import LOOP_ROLES, Pacing, all_loops, select_loop
from tandem.errors import ConfigError

_USAGE = """\
tandem loops [prefill|decode|unified] [--section.field VALUE ...]

Prints the event loops, and marks with * the one that the settings select for the role, with the reason.
Without a role: for each of them. Settings are those of a worker, e.g. --parallel.pipeline-size 4 or --config FILE."""
_PACINGS: dict[Pacing, str] = {
    "normal": "plans when the last step is accounted",
    "overlap": "plans while the device computes",
    "pipelined": "one step in each stage, each with a share",
}
_SGLANG: dict[Pacing, str] = {"normal": "normal", "overlap": "overlap", "pipelined": "pp"}  # event_loop_...
_EXAMPLE_STAGES = 2  # of the pipelined rows where no configuration says how many


def run(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the table for the words after `tandem loops`; raises ConfigError as loading a worker's settings does."""
    if "--help" in words or "-h" in words:
        print(_USAGE)
        return 0
    roles, flags = LOOP_ROLES, list(words)
    if flags and not flags[0].startswith("--"):
        role = next((role for role in get_args(Role) if role == flags[0]), None)
        if role is None:
            raise ConfigError(f"{flags[0]!r} is no role; roles are {', '.join(LOOP_ROLES)}")
        roles, flags = (role,), flags[1:]
    # The settings that choose a loop are the same for each role; unified needs no address to be reached at.
    print(table(load("unified", flags, environ), roles))
    return 0


def table(config: Config, roles: Sequence[Role]) -> str:
    """Return the table; `roles` are those whose selected loop is marked."""
    stages = config.parallel.pipeline_size
    selected = [select_loop(role, config.scheduler.loop, stages) for role in roles]
    names = {selection.loop.name for selection in selected}
    head = f"{'role':<9}{'depth':<16}{'chain':<7}{'SGLang calls it':<35}what it does"
    lines = [f"  {'loop':<19}{head}"]
    for loop in all_loops(stages if stages > 1 else _EXAMPLE_STAGES):
        mark = "*" if loop.name in names else " "
        depth = f"{loop.depth}"
        if loop.pacing == "pipelined":
            depth = f"stages - 1 = {loop.depth}" if stages > 1 else "stages - 1"
        sglang = f"event_loop_{_SGLANG[loop.pacing]}" + ("" if loop.role == "unified" else f"_disagg_{loop.role}")
        lines.append(
            f"{mark} {loop.name:<19}{loop.role:<9}{depth:<16}{loop.chain:<7}{sglang:<35}{_PACINGS[loop.pacing]}"
        )
    lines += ["", *dict.fromkeys(f"* selected: {selection.reason}" for selection in selected)]
    return "\n".join(
        [
            *lines,
            "",
            "depth: launched steps that may be unaccounted while the next one is planned.",
            "chain: steps of one answer that may be in flight; 2: the next one starts before this token is known.",
            "Stages (parallel.pipeline_size) come first, then overlap, unless scheduler.loop is normal.",
        ]
    )

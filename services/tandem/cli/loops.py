"""`tandem loops`: the event loops that can be selected, as a table."""

from __future__ import annotations

from tandem.core.roles import all_loops

_PACINGS = {
    0: "plans the next step when the last one has been accounted",
    1: "plans the next step while the device computes the last one",
}


def table() -> str:
    """Return the table."""
    lines = [f"{'loop':<18}{'role':<10}{'depth':<7}{'chain':<7}what it does"]
    for loop in all_loops():
        what = _PACINGS[min(loop.depth, 1)]
        lines.append(f"{loop.name:<18}{loop.role:<10}{loop.depth:<7}{loop.chain:<7}{what}")
    lines += [
        "",
        "depth: launched steps that may be unaccounted while the next one is planned.",
        "chain: steps of one request that may be in flight; 2: its next token is launched before this one is known.",
        "Choose with --loop normal|overlap (scheduler.loop); the role picks the row.",
    ]
    return "\n".join(lines)

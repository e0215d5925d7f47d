"""What the kernel says of this process's memory."""

from __future__ import annotations

from pathlib import Path


def mapping_at(address: int) -> dict[str, str]:
    """The fields of /proc/self/smaps of the mapping that holds an address, each with its colon; empty if none does."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            low, high = (int(bound, 16) for bound in head.split("-"))
            inside = low <= address < high
        elif inside:
            found[head] = rest.strip()
    return found

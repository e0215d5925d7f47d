"""What this machine gives this process: CPUs, instruction sets, memory; control groups respected.

Every function takes the root of the file system, so that tests can lay out a machine of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's


def has_bf16_instructions(root: Path = _ROOT) -> bool:
    """Whether the CPU multiplies bfloat16 itself; torch's bf16 linear is far slower than fp32 on one that does not."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return False
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _BF16_FLAGS.isdisjoint(flags.split())
    return False


def usable_cpus(root: Path = _ROOT) -> int:
    """How many CPUs this process may use: its affinity, cut by the quota of its control groups; at least 1."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _group_folders(root, "cpu"):
        quota = _read_words(folder / "cpu.max")
        if len(quota) == 2 and quota[0] != "max":
            count = min(count, int(quota[0]) / int(quota[1]))
        old_quota = _read_number(folder / "cpu.cfs_quota_us")
        old_period = _read_number(folder / "cpu.cfs_period_us")
        if old_quota is not None and old_quota > 0 and old_period:
            count = min(count, old_quota / old_period)
    return max(1, int(count))


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Bytes that this process can still take before the machine or one of its control groups runs out."""
    available = 0
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for folder in _group_folders(root, "memory"):
        for limit_name, usage_name, inactive_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _read_number(folder / limit_name)
            usage = _read_number(folder / usage_name)
            if limit is not None and usage is not None:
                # Unused file cache counts as usage but is given back on demand.
                available = min(available, limit - usage + _read_stat(folder / "memory.stat", inactive_name))
    return max(0, available)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups for a controller, version 1 or 2, from its own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        elif controller in controllers.split(","):
            mounts = (f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}")
        else:
            continue
        for mount in mounts:
            folder = root / mount
            yield folder
            for part in Path(path.lstrip("/")).parts:
                folder = folder / part
                yield folder


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _read_number(path: Path) -> int | None:
    words = _read_words(path)
    return int(words[0]) if words and words[0].lstrip("-").isdigit() else None


def _read_stat(path: Path, name: str) -> int:
    words = _read_words(path)
    return next((int(value) for key, value in zip(words[::2], words[1::2], strict=False) if key == name), 0)

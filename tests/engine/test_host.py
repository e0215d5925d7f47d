"""What the machine gives, read from file systems laid out by the test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tandem.engine.host import available_memory_bytes, has_bf16_instructions, usable_cpus

GIB = 1 << 30


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 fma\n", False),
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : avx512f amx_tile amx_bf16\n", True),
        ("Features : fp asimd bf16 i8mm\n", True),
        ("Features : fp asimd\n", False),
        ("", False),
    ],
)
def test_bf16_instructions(tmp_path: Path, text: str, expected: bool) -> None:
    assert has_bf16_instructions(lay_out(tmp_path, {"proc/cpuinfo": text})) is expected


def test_bf16_instructions_of_an_unknown_machine(tmp_path: Path) -> None:
    assert not has_bf16_instructions(tmp_path)


def test_memory_without_groups(tmp_path: Path) -> None:
    lay_out(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4194304 kB\n"})
    assert available_memory_bytes(tmp_path) == 4 * GIB


def test_memory_of_a_second_version_group_and_its_parents(tmp_path: Path) -> None:
    lay_out(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable: 8388608 kB\n",
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/container/memory.current": "1\n",
        },
    )
    assert available_memory_bytes(tmp_path) == 3 * GIB // 2


def test_memory_of_a_first_version_group(tmp_path: Path) -> None:
    lay_out(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable: 8388608 kB\n",
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert available_memory_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/x/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/x/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/x/cpu.max": "max 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({}, 8),
    ],
)
def test_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus(lay_out(tmp_path, files)) == expected


def test_this_machine() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    assert available_memory_bytes() > 0

"""`tandem doctor`: each absence names what is lost and the command that brings it."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from tandem.cli import doctor
from tandem.engine.native.library import NativeUnavailable


def test_here_it_runs() -> None:
    lines, code = doctor.report()
    assert code == 0
    assert {line.split()[1] for line in lines if line.startswith(("ok", "lost"))} == {
        *("python", "torch", "CPU", "ranks", "operators", "memory", "huge-pages", "libibverbs1", "mooncake", "RDMA")
    }


def test_operators_that_were_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise NativeUnavailable("no C++ compiler was found")

    monkeypatch.setattr(doctor, "load_library", absent)
    lines, code = doctor.report()
    assert code == 0
    (line,) = [line for line in lines if line.startswith("lost") and line.split()[1] == "operators"]
    assert "several times slower: no C++ compiler was found" in line


def test_ranks_are_counted_by_what_they_compute_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> str:
        return next(line for line in doctor.report()[0] if line.split()[1:2] == ["ranks"])

    monkeypatch.setattr(doctor, "_GPUS", tmp_path / "missing")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    assert "3 CPUs" in line()
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(doctor, "_GPUS", tmp_path)
    assert "2 GPUs" in line()


@pytest.mark.parametrize(
    ("free", "shmem", "level", "words"),
    [
        (500, "advise [never]", "ok", "500 of 2 MB are reserved and free, for KV pools of 1.0 GB"),
        (0, "[advise] never", "ok", "shmem_enabled is advise: KV pools lie in transparent ones"),
        (0, "advise [never]", "lost", "shmem_enabled is never: KV pools lie in ordinary ones"),
        (0, None, "lost", "sysctl -w vm.nr_hugepages=512"),
    ],
)
def test_huge_pages(tmp_path: Path, free: int, shmem: str | None, level: str, words: str) -> None:
    kernel = tmp_path / "sys" / "kernel" / "mm"
    for folder in ("hugepages/hugepages-2048kB", "transparent_hugepage"):
        (kernel / folder).mkdir(parents=True)
    (kernel / "hugepages" / "hugepages-2048kB" / "free_hugepages").write_text(f"{free}\n")
    if shmem is not None:
        (kernel / "transparent_hugepage" / "shmem_enabled").write_text(f"{shmem}\n")
    finding = doctor._huge_pages(tmp_path)
    assert finding.level == level and words in finding.text


def test_missing_libibverbs_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absence = "libibverbs.so.1 is missing (apt-get install libibverbs1)"
    monkeypatch.setattr(doctor, "mooncake_absence", lambda: absence)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    text = "\n".join(doctor.report()[0])
    assert "sudo apt-get install -y libibverbs1" in text
    assert "plain TCP works" in text
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "sudo" not in "\n".join(doctor.report()[0])


def test_without_torch_no_worker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def absent(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    lines, code = doctor.report()
    assert code == 1
    assert any(line.startswith("broken") and "tandem-serve[cpu]" in line for line in lines)

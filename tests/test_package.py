"""The package as pip builds it: a wheel that works, with a compiler and without one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = "tandem/engine/native"
_USE = """
import torch
from tandem.engine.ops.cpu import CpuOperators, KERNELS
from tandem.engine.native.library import NativeUnavailable
try:
    cpu = CpuOperators()
    print(cpu.name, cpu.linear((torch.eye(32),), (None,))(torch.ones(1, 32)).sum().item())
except NativeUnavailable as missing:
    print(missing)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What the build needs of the tree, so that it leaves nothing in the checkout."""
    folder = tmp_path / "source"
    shutil.copytree(ROOT / "native", folder / "native", ignore=shutil.ignore_patterns("__pycache__"))
    built = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "not_built.txt", "demo")
    shutil.copytree(ROOT / "services", folder / "services", ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, compiler: str) -> Path:
    """Build without an environment of its own: nothing is downloaded."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(source / "wheels"), str(source)],
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = (source / "wheels").glob("*.whl")
    return wheel


def use(wheel: Path, folder: Path) -> str:
    """What a program says that uses the operators of the unpacked wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _USE], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    """It installs, and whoever asks for the operators learns what is missing and why."""
    wheel = build_wheel(source, str(tmp_path / "no-such-compiler"))
    names = zipfile.ZipFile(wheel).namelist()
    assert f"{NATIVE}/not_built.txt" in names
    assert not [name for name in names if name.endswith(".so")]
    said = use(wheel, tmp_path / "unpacked")
    assert "it was not built when the package was installed" in said
    assert "no-such-compiler" in said or platform.machine() != "x86_64"


@pytest.mark.slow
def test_with_a_compiler(source: Path, tmp_path: Path) -> None:
    """Built without optimization, which takes a fraction of the time."""
    real = shutil.which("g++")
    if real is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler, or no kernels for this machine")
    compiler = tmp_path / "quick-compiler"
    compiler.write_text(
        f'#!/bin/sh\nfor word in "$@"; do shift; [ "$word" = -O3 ] || set -- "$@" "$word"; done\n{real} "$@"\n'
    )
    compiler.chmod(0o755)
    wheel = build_wheel(source, str(compiler))
    assert wheel.name.split("-")[2:4] == ["py3", "none"], "one wheel for every Python"
    names = zipfile.ZipFile(wheel).namelist()
    assert f"{NATIVE}/libtandem_operators.so" in names
    assert f"{NATIVE}/not_built.txt" not in names
    said = use(wheel, tmp_path / "unpacked")
    assert said.endswith(" 32.0") if said.startswith("cpu-") else "no AVX2" in said

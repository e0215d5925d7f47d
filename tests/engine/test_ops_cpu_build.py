"""The library's build and loading: what is said when something is missing, and a run under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.engine.native import library as native
from tandem.engine.native.library import NativeUnavailable, load_library
from tandem.engine.ops.cpu import CpuOperators
from tests.engine.ops_cpu_cases import LIBRARY_VARIABLE, ROOT, build_module, built_library, library


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NativeUnavailable, match=r"nowhere\.so is not there"):
        load_library(tmp_path / "nowhere.so")
    note = tmp_path / "not_built.txt"
    note.write_text("no C++ compiler was found\n")
    monkeypatch.setattr(native, "NOTE_PATH", note)
    monkeypatch.setattr(native, "LIBRARY_PATH", tmp_path / "nowhere.so")
    with pytest.raises(NativeUnavailable, match="when the package was installed: no C"):
        load_library(tmp_path / "nowhere.so")


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
        load_library(path)


def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(library()._name)
    monkeypatch.setattr(native, "INTERFACE_VERSION", 999)
    with pytest.raises(NativeUnavailable, match="this package needs 999"):
        load_library(path)


def test_a_library_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(library()._name)
    monkeypatch.setitem(native._FUNCTIONS, "tandem_of_tomorrow", (None, []))
    with pytest.raises(NativeUnavailable, match="without tandem_of_tomorrow, this package needs"):
        load_library(path)


def test_unknown_kernels() -> None:
    with pytest.raises(NativeUnavailable, match="avx9 kernels"):
        CpuOperators("avx9", 1, library())


def test_build_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_module()
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(module.BuildFailed, match="no-compiler"):  # type: ignore[attr-defined]
        module.build(tmp_path / "library.so", tmp_path / "objects")  # type: ignore[attr-defined]
    assert not (tmp_path / "library.so").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them compiles, the others wait for it
@pytest.mark.parametrize("part", ["", "_attention", "_bits", "_experts", "_pool", "_profile", "_tiles"])
def test_under_sanitizers(part: str) -> None:
    """The other tests of the operators, with addresses and undefined behaviour checked in every C++ line."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    checked = built_library("sanitizers", sanitizers=("address", "undefined"))
    preloaded = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        LIBRARY_VARIABLE: str(checked),
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # the interpreter leaks at exit
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"tests/engine/test_ops_cpu{part}.py",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert " passed" in done.stdout

"""The Dockerfile, as hadolint sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.chart.rendered import ROOT

HADOLINT = Path(sys.executable).parent / "hadolint"


def _lint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "--no-color", path], capture_output=True, text=True, timeout=60)


def test_the_dockerfile_is_clean() -> None:
    result = _lint(ROOT / "Dockerfile")
    assert result.returncode == 0, result.stdout


def test_hadolint_sees_a_fault(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text((ROOT / "Dockerfile").read_text() + "\nRUN cd /tmp && sudo ls\n")
    assert "DL3004" in _lint(bad).stdout

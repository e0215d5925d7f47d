"""No garbage collection of a running program looks at what was there when it became ready."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.service import Service

# Every program says how many objects its collections leave alone, when it is asked to.
HOOK = """
import gc, os, signal
from pathlib import Path
def tell(number, frame):
    to = Path(__file__).with_name(f"{os.getpid()}.new")
    to.write_text(str(gc.get_freeze_count()))
    to.rename(to.with_suffix(".told"))
signal.signal(signal.SIGUSR2, tell)
"""
MOST = 30_000  # objects of a program that has started, at least; a rank has six times as many


def test_what_was_there_at_the_start_is_left_alone(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    worker = service.worker("unified", "--parallel.tensor-size", "2").wait_ready()
    gateway = service.gateway([], [worker])
    ranks = [pid for kind in ("rank_main", "follower_main") for pid in worker.children(kind)]
    assert len(ranks) == 2
    for pid in (gateway.process.pid, worker.process.pid, *ranks):
        os.kill(pid, signal.SIGUSR2)
        told, deadline = folder / f"{pid}.told", time.monotonic() + 30
        while not told.exists():
            assert time.monotonic() < deadline, pid
            time.sleep(0.01)
        assert int(told.read_text()) > MOST, pid

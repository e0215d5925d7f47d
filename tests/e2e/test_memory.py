"""A model is in memory once: while it is loaded, and afterwards."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tandem.cli.bench_shapes import SHAPES
from tandem.engine.bench_model import MakeModelRequest, make_model
from tests.e2e.service import Program

POOL_BYTES = 100 << 20
SLACK_BYTES = 500 << 20  # Python, torch and what they load


@pytest.mark.slow
def test_peak_memory_of_a_worker(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model(MakeModelRequest(config=SHAPES["qwen2.5-0.5b"], folder=str(folder)), lambda text: None)
    weight_bytes = (folder / "model.safetensors").stat().st_size
    began = time.monotonic()
    program = Program("unified", tmp_path, "--model.path", str(folder), "--cache.pool-bytes", str(POOL_BYTES))
    try:
        program.wait_ready()
        seconds = time.monotonic() - began
        (rank,) = program.children("rank_main")
        peak_bytes = _peak_bytes(rank)
        print(f"ready after {seconds:.1f} s, peak {peak_bytes / 1e9:.2f} GB for {weight_bytes / 1e9:.2f} GB of weights")
        assert peak_bytes <= 1.15 * (weight_bytes + POOL_BYTES) + SLACK_BYTES
    finally:
        program.stop()


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024


def test_the_peak_is_read_right() -> None:
    """The test's own eyes: memory that is touched shows."""
    before = _peak_bytes(os.getpid())
    block = bytearray(os.urandom(1)) * (300 << 20)
    assert _peak_bytes(os.getpid()) - before > 100 << 20
    del block

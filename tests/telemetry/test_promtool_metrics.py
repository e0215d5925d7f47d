"""What real programs export is clean for Prometheus' own linter."""

from __future__ import annotations

import random
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.telemetry import table
from tests.e2e.oracle import greedy, make_checkpoint, random_prompt
from tests.e2e.service import Program, Service

PROMTOOL = shutil.which("promtool")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    make_checkpoint(tmp_path / "checkpoint")
    service = Service(tmp_path / "checkpoint", tmp_path)
    try:
        yield service
    finally:
        service.close()


def exposition(program: Program) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{program.ready['metrics_port']}/metrics", timeout=10) as reply:
        text: str = reply.read().decode()
    return text


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")
def test_promtool_finds_nothing_to_say(service: Service) -> None:
    assert PROMTOOL is not None
    workers = [service.worker("prefill").wait_ready(), service.worker("decode").wait_ready()]
    prefill, decode = workers
    gateway = service.gateway([prefill], [decode], "--server.metrics-port", "0", "--telemetry.genai-metrics", "true")
    (*_, last) = service.stub(gateway).StreamGenerate(greedy(random_prompt(random.Random(1), 40), 6))
    assert last.timing.HasField("queue")
    assert last.timing.prefill.ToNanoseconds() > 0, "the prefill worker's own word"
    assert last.timing.kv_transfer.ToNanoseconds() > 0
    assert last.timing.first_decode.ToNanoseconds() > 0
    for worker in workers:
        worker.wait_metric(lambda program: program.worker_metric("steps") > 0)
    names = {metric.name for metric in table.ALL_METRICS}
    for program in (gateway, prefill, decode):
        text = exposition(program)
        checked = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", ""), program.name
        exported = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
        assert {name.removesuffix("_total").removesuffix("_info") for name in exported} <= names
    decode.wait_metric(lambda program: program.worker_metric("peer_handoffs") == 1)

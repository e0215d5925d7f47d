"""A worker that has nothing to do takes no processor time, and has the threads that it was told to have."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Program, Service

THREADS = 3
SECONDS = 2.0
IDLE_SHARE = 0.1  # of one CPU: timers and keepalives. A thread that spins takes all of it.


def cpu_seconds(program: Program) -> float:
    pids = [program.process.pid, *program.children("tandem")]
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def thread_names(pid: int) -> list[str]:
    return [path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")]


@pytest.mark.parametrize("ops", ["auto", "reference"])
def test_an_idle_worker(service: Service, made: tuple[Path, Oracle], ops: str) -> None:
    worker = service.worker("unified", "--model.threads", str(THREADS), "--model.ops", ops).wait_ready()
    stub = service.stub(service.gateway([], [worker]))
    stub.Generate(greedy(random_prompt(random.Random(8), 300), 32))  # every thread has worked
    time.sleep(0.5)

    def used() -> float:
        before = cpu_seconds(worker)
        time.sleep(SECONDS)
        return cpu_seconds(worker) - before

    assert min(used() for _ in range(3)) <= IDLE_SHARE * SECONDS, "late work of the request is not in all of them"
    if worker.ready["operators"].startswith("cpu-"):
        (rank,) = worker.children("rank_main")
        names = thread_names(rank)
        assert len(names) <= THREADS + 4, f"torch has threads beside the operators' own: {names}"

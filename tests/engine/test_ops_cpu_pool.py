"""The library's threads: they sleep when there is nothing to do, wake up again, and are as many as the CPUs given."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.engine.ops_cpu_cases import generator, operators

THREADS = 4


def test_an_idle_pool_uses_no_cpu() -> None:
    cpu = operators("avx2", THREADS)
    linear = cpu.linear((torch.randn(512, 256, generator=generator(1)),), (None,))
    inputs = torch.randn(64, 256, generator=generator(2))
    expected = linear(inputs)
    used = []
    for _ in range(3):
        time.sleep(0.05)  # far longer than a thread spins
        before = time.process_time()
        time.sleep(0.4)
        used.append(time.process_time() - before)
        assert torch.equal(linear(inputs), expected)  # and they wake up
    assert min(used) < 0.1, "threads that spin would always use as much as they get, several tenths of a second"


@pytest.mark.parametrize("threads", [2, 3, 5, 8])
def test_each_task_runs_once(threads: int) -> None:
    """Fewer tasks than threads, as many, far more; a task that ran twice would add twice, one left out not at all."""
    alone, together = operators("avx2", 1), operators("avx2", threads)
    for outputs in (8, 100, 2000):
        weight = torch.randn(outputs, 64, generator=generator(1))
        one, many = (cpu.linear((weight,), (None,)) for cpu in (alone, together))
        for rows in (1, 3, 13, 300):
            inputs = torch.randn(rows, 64, generator=generator(2))
            expected = torch.ones(rows, outputs)
            one.add_to(expected, inputs)
            for _ in range(5):
                result = torch.ones(rows, outputs)
                many.add_to(result, inputs)
                assert torch.equal(result, expected)


def test_threads_start_and_end_with_the_operators() -> None:
    before = set(os.listdir("/proc/self/task"))
    cpu = operators("avx2", THREADS)
    made = set(os.listdir("/proc/self/task")) - before
    assert len(made) == THREADS - 1
    del cpu
    deadline = time.monotonic() + 20
    while made & set(os.listdir("/proc/self/task")):  # the kernel removes them a little after they are joined
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""Workers that stall in the middle of an answer, and ways to take them away, for the tests of resumption."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.worker import FakeWorker, scripted
from tests.gateway.harness import Setup, byte_worker, until
from tests.gateway.model import ids_of

TEXT = "aé€😀ü, and so on. "


def stalling(after: int | None, text: str = TEXT, **options: Any) -> FakeWorker:
    """A worker that says `text` over and over, but no more than `after` tokens of an answer."""
    return byte_worker(token=scripted(ids_of(text)), stall_after=after, **options)


async def kill(worker: FakeWorker) -> None:
    await worker.kill()


async def drain(worker: FakeWorker) -> None:
    worker.drain()


by_each_way = pytest.mark.parametrize("end", [pytest.param(kill, id="killed"), pytest.param(drain, id="drained")])
CAUSE: dict[Any, str] = {kill: "worker_lost", drain: "drained"}


async def serving(setup: Setup, num_sequences: int = 1) -> FakeWorker:
    """The decode worker that has the request, once the gateway has every token that it gives."""

    def has_it(worker: FakeWorker) -> bool:
        running = [running for session in worker.sessions for running in session.running.values()]
        return len(running) == num_sequences and all(one.emitted == worker.stall_after for one in running)

    await until(lambda: any(map(has_it, setup.workers)))
    worker = next(filter(has_it, setup.workers))
    # What has not arrived when a worker is killed is lost, and the answer would be cut elsewhere than the test says.
    await until(lambda: count(setup, "tokens", kind="output") == sum(each.num_sent for each in setup.workers))
    return worker


def count(setup: Setup, name: str, **labels: str) -> float:
    value = setup.gateway._registry.get_sample_value(f"tandem_gateway_{name}_total", labels)
    return value or 0.0


def said(num_tokens: int, text: str = TEXT) -> list[int]:
    return [scripted(ids_of(text))([], index) for index in range(num_tokens)]

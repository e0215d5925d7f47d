"""Shared parts of the end-to-end tests: one checkpoint for all, services that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.oracle import LLAMA, SLOW_LLAMA, Oracle, make_checkpoint
from tests.e2e.service import Service
from tests.e2e.twin import Twin
from tests.e2e.wired import Wired
from tests.engine.checkpoints import Variant
from tests.fakes.transport_proxy import Faults


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    return judged(tmp_path_factory.mktemp("e2e") / "checkpoint", LLAMA)


@pytest.fixture(scope="session")
def oracle(made: tuple[Path, Oracle]) -> Oracle:
    return made[1]


@pytest.fixture(scope="session")
def slow_made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    return judged(tmp_path_factory.mktemp("e2e-slow") / "checkpoint", SLOW_LLAMA)


@pytest.fixture
def service(made: tuple[Path, Oracle], tmp_path: Path) -> Iterator[Service]:
    yield from closing(Service(made[0], tmp_path))


@pytest.fixture
def slow_service(slow_made: tuple[Path, Oracle], tmp_path: Path) -> Iterator[Service]:
    """For tests that do something to a request and want it to be still running."""
    yield from closing(Service(slow_made[0], tmp_path))


@pytest.fixture
def wired(service: Service) -> Iterator[Callable[..., Wired]]:
    made: list[Wired] = []

    def make(*flags: str, faults: Faults | None = None) -> Wired:
        made.append(Wired(service, *flags, faults=faults))
        return made[-1]

    yield make
    for one in made:
        one.proxy.close()


def judged(folder: Path, variant: Variant) -> tuple[Path, Oracle]:
    """Write a checkpoint; return it with who judges answers that are made with it."""
    torch.set_num_threads(1)
    return folder, Oracle(make_checkpoint(folder, variant), Twin(folder))


def closing(service: Service) -> Iterator[Service]:
    try:
        yield service
    finally:
        service.close()

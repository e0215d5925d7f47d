"""Shared parts of the end-to-end tests: one checkpoint for all, services that end with their test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.oracle import Oracle, make_checkpoint
from tests.e2e.service import Service
from tests.e2e.twin import Twin


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("e2e") / "checkpoint"
    return folder, Oracle(make_checkpoint(folder), Twin(folder))


@pytest.fixture(scope="session")
def oracle(made: tuple[Path, Oracle]) -> Oracle:
    return made[1]


@pytest.fixture
def service(made: tuple[Path, Oracle], tmp_path: Path) -> Iterator[Service]:
    service = Service(made[0], tmp_path)
    try:
        yield service
    finally:
        service.close()

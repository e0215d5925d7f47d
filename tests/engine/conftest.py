"""One compute thread for everything here, and engines that are closed at the end of their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from tandem.engine.start import Engine, start_engine

EngineStarter = Callable[..., Engine]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def start() -> Iterator[EngineStarter]:
    """Start an engine over a checkpoint folder with a pool of `num_pages` pages."""
    engines: list[Engine] = []

    def starter(folder: Path | str, *, pool_bytes: int = 8 << 20, page_tokens: int = 8, **model: Any) -> Engine:
        config = Config(
            model=ModelConfig(**{"path": str(folder), "threads": 1, "device": "cpu", **model}),
            cache=CacheConfig(pool_bytes=pool_bytes, page_tokens=page_tokens),
            scheduler=SchedulerConfig(max_running_requests=64),
        )
        engine = start_engine(config, lambda _: None)
        engines.append(engine)
        return engine

    yield starter
    for engine in engines:
        engine.device.close()
        engine.memory.close()

"""The CUDA device against the CPU device over the same checkpoint, and its shared mirror of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.config import CacheConfig, Config, ModelConfig
from tandem.engine.pool import host_pool
from tandem.engine.start import Engine, start_engine
from tests.engine.checkpoints import VARIANTS, VOCABULARY, write_checkpoint
from tests.engine.driver import PlanDriver, take

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NUM_NEW = 24
PROMPTS = [
    tuple(np.random.default_rng(length).integers(0, VOCABULARY, length).tolist()) for length in (1, 7, 8, 40, 300)
]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Engine]]:
    write_checkpoint(VARIANTS[0], tmp_path, max_position_embeddings=512)
    engines: list[Engine] = []

    def starter(device: str) -> Engine:
        model = ModelConfig(path=str(tmp_path), device="cuda" if device == "cuda" else "cpu")
        engines.append(start_engine(Config(model=model, cache=CacheConfig(pool_bytes=16 << 20)), lambda _: None))
        return engines[-1]

    yield starter
    for engine in engines:
        engine.device.close()
        engine.memory.close()


def driver_of(engine: Engine) -> PlanDriver:
    return PlanDriver(engine.device, num_pages=engine.layout.num_pages, page_tokens=engine.layout.page_tokens)


def test_same_tokens_as_the_cpu(start: Callable[[str], Engine]) -> None:
    outputs = []
    for device in ("cpu", "cuda"):
        driver = driver_of(start(device))
        requests = [driver.start(prompt, NUM_NEW) for prompt in PROMPTS]
        driver.generate(requests, NUM_NEW, chunk_max=50)
        outputs.append([request.output for request in requests])
    identical = sum(cpu == gpu for cpu, gpu in zip(*outputs, strict=True))
    assert identical >= len(PROMPTS) - 1  # a near-tie may go either way


def test_plans_are_issued_ahead(start: Callable[[str], Engine]) -> None:
    driver = driver_of(start("cuda"))
    request = driver.start(PROMPTS[3], NUM_NEW)
    driver.launch([driver.row(request, len(request.prompt))])
    request.computed = len(request.prompt)
    sample = driver.row(request, 1).sample
    assert sample is not None
    for index in range(1, NUM_NEW):
        row = replace(driver.row(request, 1, unseen=True), sample=replace(sample, output_index=index))
        driver.launch([row])
        request.computed += 1
    results = take(driver.device, NUM_NEW)
    tokens = [result.rows[0].token_id for result in results]
    alone = driver.start(PROMPTS[3], NUM_NEW)
    driver.generate([alone], NUM_NEW, chunk_max=50)
    assert tokens == alone.output
    assert all(result.device_seconds > 0 for result in results)


def test_handed_over_through_shared_memory(start: Callable[[str], Engine]) -> None:
    """Prefill on the GPU, its pages copied between the mirrors of two devices, decode on the other GPU pool."""
    giver, taker = start("cuda"), start("cuda")
    prompt = PROMPTS[4]
    source, target = driver_of(giver), driver_of(taker)
    alone = source.start(prompt, NUM_NEW)
    source.generate([alone], NUM_NEW, chunk_max=300)
    given = source.start(prompt, NUM_NEW)
    (result,) = source.execute([source.row(given, len(prompt), zero_tail=True)])
    taken = target.start(prompt, NUM_NEW)
    num_pages = -(-len(prompt) // target.page_tokens)
    giver_pool, taker_pool = host_pool(giver.memory, giver.layout), host_pool(taker.memory, taker.layout)
    taker_pool[list(taken.pages[:num_pages])] = giver_pool[list(given.pages[:num_pages])]
    target.device.adopt(taken.pages[:num_pages])
    assert result.token_id is not None
    taken.output.append(result.token_id)
    taken.computed = len(prompt)
    target.generate([taken], NUM_NEW, chunk_max=1)
    assert taken.output == alone.output
    tail = giver_pool[given.pages[num_pages - 1], :, :, :, len(prompt) % source.page_tokens :]
    assert not tail.any()

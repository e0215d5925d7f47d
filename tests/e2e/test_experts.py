"""A mixture of experts, prompts computed by one process and answers by another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.oracle import Oracle, greedy, make_checkpoint, random_prompt
from tests.e2e.service import Service
from tests.e2e.twin import Twin
from tests.engine.checkpoints import Variant

MIXTRAL = Variant("e2e", "MixtralConfig", {"num_local_experts": 6}, published=True)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    folder = tmp_path_factory.mktemp("experts") / "checkpoint"
    return folder, Oracle(make_checkpoint(folder, MIXTRAL), Twin(folder))


@pytest.fixture
def experts(mixtral: tuple[Path, Oracle], tmp_path: Path) -> Iterator[Service]:
    service = Service(mixtral[0], tmp_path)
    try:
        yield service
    finally:
        service.close()


SPREAD = ("--parallel.tensor-size", "2", "--parallel.expert-size", "2")


@pytest.mark.parametrize("spread", [(), SPREAD], ids=["whole", "spread"])
def test_a_mixture_of_experts_is_handed_over(
    experts: Service, mixtral: tuple[Path, Oracle], spread: tuple[str, ...]
) -> None:
    """From prefill in one process or in two ranks with half of the experts each: the tokens of one process alone."""
    prefill = experts.worker("prefill", "--scheduler.budget-tokens", "64", *spread).wait_ready()
    decode = experts.worker("decode").wait_ready()
    stub = experts.stub(experts.gateway([prefill], [decode]))
    source = random.Random(4)
    for length in (1, 17, 200):
        prompt = random_prompt(source, length)
        response = stub.Generate(greedy(prompt, 24), timeout=60)
        mixtral[1].check(prompt, list(response.choices[0].token_ids), 24)
        assert response.timing.kv_bytes > 0
    assert decode.worker_metric("local_prefills") == 0


def test_spread_experts_serve_the_same(experts: Service, mixtral: tuple[Path, Oracle]) -> None:
    worker = experts.worker("unified", *SPREAD).wait_ready()
    assert "expert2" in worker.ready["numerics"] or not worker.ready["numerics"]
    stub = experts.stub(experts.gateway([], [worker]))
    prompt = random_prompt(random.Random(6), 90)
    response = stub.Generate(greedy(prompt, 32), timeout=60)
    mixtral[1].check(prompt, list(response.choices[0].token_ids), 32)
    assert worker.stop() == 0

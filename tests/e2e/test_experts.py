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


def test_a_mixture_of_experts_is_handed_over(experts: Service, mixtral: tuple[Path, Oracle]) -> None:
    """The gate of each token's experts sees the same bits on both sides, chunked or not."""
    prefill = experts.worker("prefill", "--scheduler.budget-tokens", "64").wait_ready()
    decode = experts.worker("decode").wait_ready()
    stub = experts.stub(experts.gateway([prefill], [decode]))
    source = random.Random(4)
    for length in (1, 17, 200):
        prompt = random_prompt(source, length)
        output: list[int] = []
        last = None
        for message in stub.StreamGenerate(greedy(prompt, 24)):
            output.extend(message.token_ids)
            last = message
        mixtral[1].check(prompt, output, 24)
        assert last is not None
        assert last.timing.kv_bytes == -(-length // prefill.ready["page_tokens"]) * prefill.ready["page_bytes"]
    assert decode.worker_metric("local_prefills") == 0

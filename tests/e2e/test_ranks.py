"""Workers whose model several processes share: the tokens are those of one process, also across a hand-off."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Program, Service

SHARED = 100  # prompt tokens that some requests have in common, more than one page


def sizes(tensor_size: int, pipeline_size: int) -> tuple[str, ...]:
    return ("--parallel.tensor-size", str(tensor_size), "--parallel.pipeline-size", str(pipeline_size))


def check_answers(service: Service, oracle: Oracle, prefills: list[Program], decodes: list[Program]) -> None:
    """Prompts of several chunks, common beginnings, several at once."""
    stub = service.stub(service.gateway(prefills, decodes))
    source = random.Random(5)
    beginning = random_prompt(source, SHARED)
    prompts = [random_prompt(source, length) for length in (1, 16, 150)]
    prompts += [beginning + random_prompt(source, length) for length in (1, 30)]

    def answer(prompt: list[int]) -> list[int]:
        return list(stub.Generate(greedy(prompt, 24), timeout=120).choices[0].token_ids)

    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(answer, prompts))
    for prompt, output in zip(prompts, answers, strict=True):
        oracle.check(prompt, output, 24)
    for worker in (*prefills, *decodes):
        worker.wait_metric(lambda program: program.pages_in_use() == 0)
        assert worker.worker_metric("orphaned_pages") == 0
    assert sum(worker.worker_metric("local_prefills") for worker in decodes if prefills) == 0
    assert [program.stop() for program in service.programs] == [0] * len(service.programs)


@pytest.mark.parametrize(("tensor_size", "pipeline_size"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_serve_the_same(service: Service, oracle: Oracle, tensor_size: int, pipeline_size: int) -> None:
    worker = service.worker("unified", *sizes(tensor_size, pipeline_size), "--scheduler.budget-tokens", "64")
    worker.wait_ready()
    assert worker.ready["loop"] == ("pipelined" if pipeline_size > 1 else "overlap")
    assert worker.ready["num_pages"] == (48 << 20) // worker.ready["page_bytes"], "as many as in one process"
    check_answers(service, oracle, [], [worker])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exporter", "importer"),
    [((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 2), (1, 1)), ((2, 2), (1, 1))],
)
def test_hand_off_between_ranks(
    service: Service, oracle: Oracle, exporter: tuple[int, int], importer: tuple[int, int]
) -> None:
    prefill = service.worker("prefill", *sizes(*exporter), "--scheduler.budget-tokens", "64")
    decode = service.worker("decode", *sizes(*importer))
    check_answers(service, oracle, [prefill.wait_ready()], [decode.wait_ready()])

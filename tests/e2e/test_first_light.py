"""A real prompt through a prefill process and a decode process, over every transport and pair of loops."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Program, Service
from tests.e2e.test_faults import MOONCAKE


def pair(service: Service, transport: tuple[str, ...], prefill_loop: str, decode_loop: str) -> tuple[Program, Program]:
    prefill = service.worker("prefill", *transport, "--scheduler.loop", prefill_loop, "--scheduler.budget-tokens", "64")
    decode = service.worker("decode", *transport, "--scheduler.loop", decode_loop)
    return prefill.wait_ready(), decode.wait_ready()


@pytest.mark.parametrize(
    ("transport", "prefill_loop", "decode_loop"),
    [
        (("--transfer.transport", "tcp"), "overlap", "overlap"),
        (("--transfer.transport", "auto"), "normal", "overlap"),
        (("--transfer.transport", "tcp"), "overlap", "normal"),
        pytest.param(MOONCAKE, "normal", "normal", marks=pytest.mark.mooncake),
    ],
)
def test_streams_are_exact(
    service: Service, oracle: Oracle, transport: tuple[str, ...], prefill_loop: str, decode_loop: str
) -> None:
    prefill, decode = pair(service, transport, prefill_loop, decode_loop)
    assert prefill.ready["loop"] == f"{prefill_loop}_prefill"
    assert decode.ready["loop"] == f"{decode_loop}_decode"
    for worker in (prefill, decode):
        assert worker.log().count("KV transport: ") == 1, "what was chosen is said once"
    stub = service.stub(service.gateway([prefill], [decode]))
    source = random.Random(1)
    for length in (1, 15, 16, 17, 333):
        prompt = random_prompt(source, length)
        output: list[int] = []
        last = None
        for message in stub.StreamGenerate(greedy(prompt, 24)):
            output.extend(message.token_ids)
            last = message
        oracle.check(prompt, output, 24)
        assert last is not None
        assert last.timing.kv_transport == ("mooncake-tcp" if transport is MOONCAKE else "tcp")
        pages = -(-length // prefill.ready["page_tokens"])
        assert last.timing.kv_bytes == pages * prefill.ready["page_bytes"]
        assert last.usage.prompt_tokens == length
        assert last.usage.completion_tokens == len(output)
    for worker in (prefill, decode):
        worker.wait_metric(lambda program: program.pages_in_use() == 0)
        assert worker.worker_metric("orphaned_pages") == 0
    assert prefill.worker_metric("leases_started") == 0
    assert [program.stop() for program in service.programs] == [0] * len(service.programs)


def test_unified_serves_the_same(service: Service, oracle: Oracle) -> None:
    unified = service.worker("unified", "--scheduler.budget-tokens", "32").wait_ready()
    stub = service.stub(service.gateway([], [unified]))
    prompt = random_prompt(random.Random(2), 200)
    response = stub.Generate(greedy(prompt, 32))
    oracle.check(prompt, list(response.choices[0].token_ids), 32)
    assert response.timing.kv_transport == ""


@pytest.mark.slow
def test_two_hundred_streams(service: Service, oracle: Oracle) -> None:
    """200 at once, random lengths, shared beginnings: all exact, and the pools are back to empty afterwards."""
    prefills = [service.worker("prefill", "--transfer.transport", "tcp") for _ in range(2)]
    decodes = [service.worker("decode", "--transfer.transport", "tcp") for _ in range(2)]
    for worker in (*prefills, *decodes):
        worker.wait_ready()
    stub = service.stub(service.gateway(prefills, decodes))
    source = random.Random(3)
    shared = [random_prompt(source, 64) for _ in range(4)]
    jobs = []
    for _ in range(200):
        beginning = source.choice(shared)[: source.choice([0, 40, 64])]
        jobs.append((beginning + random_prompt(source, source.randint(1, 200)), source.randint(1, 32)))

    def run(job: tuple[list[int], int]) -> list[int]:
        prompt, max_tokens = job
        output: list[int] = []
        for message in stub.StreamGenerate(greedy(prompt, max_tokens), timeout=240):
            output.extend(message.token_ids)
        return output

    with ThreadPoolExecutor(200) as threads:
        outputs = list(threads.map(run, jobs))
    for (prompt, max_tokens), output in zip(jobs, outputs, strict=True):
        oracle.check(prompt, output, max_tokens)
    for worker in (*prefills, *decodes):
        worker.wait_metric(lambda program: program.pages_in_use() == 0)
        assert worker.worker_metric("orphaned_pages") == 0
        assert worker.worker_metric("leases_started") == 0
    assert sum(worker.worker_metric("local_prefills") for worker in decodes) == 0
    assert all(worker.worker_metric("transferred_bytes") > 0 for worker in decodes)

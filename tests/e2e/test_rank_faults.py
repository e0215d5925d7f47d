"""Hand-offs between workers of several ranks that do not go the plain way: right answers, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tandem.transfer.choice import mooncake_absence
from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import FREE_SECONDS, Service
from tests.e2e.streams import TCP
from tests.e2e.test_faults import MOONCAKE, all_free, collect
from tests.e2e.test_ranks import sizes
from tests.e2e.wired import Wired
from tests.fakes.transport_proxy import Faults


@pytest.mark.mooncake
@pytest.mark.skipif(bool(mooncake_absence()), reason=mooncake_absence() or "Mooncake is there")
@pytest.mark.parametrize(("exporter", "importer"), [((1, 1), (2, 1)), ((2, 1), (1, 2))])
def test_one_sided_reads_between_ranks(
    service: Service, oracle: Oracle, exporter: tuple[int, int], importer: tuple[int, int]
) -> None:
    prefill = service.worker("prefill", *MOONCAKE, *sizes(*exporter))
    decode = service.worker("decode", *MOONCAKE, *sizes(*importer)).wait_ready()
    prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    prompt = random_prompt(random.Random(4), 200)
    response = stub.Generate(greedy(prompt, 12), timeout=60)
    oracle.check(prompt, list(response.choices[0].token_ids), 12)
    assert response.timing.kv_transport == "mooncake-tcp", decode.log()
    all_free(prefill, decode)


def test_a_flipped_bit_in_one_ranks_piece(service: Service, oracle: Oracle, wired: Callable[..., Wired]) -> None:
    """Both decode ranks read through the proxy; one piece of one page is wrong, and the page is read again."""
    one = wired(faults=Faults(flip_at=50_000, num_faulty=1))
    decode = service.worker("decode", *TCP, *sizes(2, 1)).wait_ready()
    prefill = one.prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    prompt = random_prompt(random.Random(10), 800)
    oracle.check(prompt, collect(stub, prompt, 12), 12)
    decode.wait_metric(lambda program: program.worker_metric("checksum_mismatches") == 1)
    assert decode.worker_metric("local_prefills") == 0
    all_free(prefill, decode)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_transfer_process_is_killed(
    service: Service, oracle: Oracle, wired: Callable[..., Wired], rank: int
) -> None:
    """What the other rank reads is ended; then the hand-off is attached again, and read by both."""
    one = wired("--handoff.lease-seconds", "8")
    decode = service.worker("decode", *TCP, *sizes(1, 2)).wait_ready()
    prefill = one.prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    prompt = random_prompt(random.Random(9), 500)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(collect, stub, prompt, 12)
        assert one.proxy.has_stalled.wait(20)
        victims = sorted(decode.children("tandem.transfer"))
        assert len(victims) == 2
        os.kill(victims[rank], signal.SIGKILL)
        one.proxy.release()
        oracle.check(prompt, answer.result(60), 12)
    assert decode.worker_metric("local_prefills") == 0, "attached again, nothing computed twice"
    all_free(prefill, decode, seconds=8 + FREE_SECONDS)
    oracle.check(prompt, collect(stub, prompt, 12), 12)


@pytest.mark.slow
def test_transfer_processes_are_killed_again_and_again(service: Service, oracle: Oracle) -> None:
    """Of any rank, on both sides, while answers are on their way: each is right, and afterwards all is as before."""
    flags = (*TCP, "--handoff.lease-seconds", "1", "--scheduler.budget-tokens", "64")
    prefill = service.worker("prefill", *flags, *sizes(2, 1))
    decode = service.worker("decode", *flags, *sizes(1, 2)).wait_ready()
    prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    source = random.Random(3)
    prompts = [random_prompt(source, source.randint(100, 900)) for _ in range(16)]
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(stub.Generate, greedy(prompt, 24), timeout=120) for prompt in prompts]
        for number in range(4):
            time.sleep(0.4)
            victims = sorted((prefill if number % 2 else decode).children("tandem.transfer"))
            if victims:
                os.kill(source.choice(victims), signal.SIGKILL)
        outputs = [list(answer.result(120).choices[0].token_ids) for answer in answers]
    for prompt, output in zip(prompts, outputs, strict=True):
        oracle.check(prompt, output, 24)
    all_free(prefill, decode, seconds=10.0)
    prompt = random_prompt(source, 300)
    before = decode.worker_metric("local_prefills")
    oracle.check(prompt, collect(stub, prompt, 12), 12)
    assert decode.worker_metric("local_prefills") == before, "the hand-off works again"
    assert [program.stop() for program in service.programs] == [0] * len(service.programs)

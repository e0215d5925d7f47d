"""Several replicas of the model in one worker (parallel.data_size): right answers, shared work, one life."""

from __future__ import annotations

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Program, Service

SOON = 12.0  # two seconds, and more for a machine that runs other tests; what waits for a drain takes 60
TWO = ("--parallel.data-size", "2", "--server.drain-seconds", "60")


def by_replica(program: Program, name: str) -> list[float]:
    """Return a metric of both replicas."""
    found = {
        series: value
        for series, value in program.metrics().items()
        if series.startswith(f"tandem_worker_replica_{name}{{")
    }
    return [next(value for series, value in found.items() if f'replica="{index}"' in series) for index in range(2)]


def ask(stub: InferenceServiceStub, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    def one(prompt: list[int]) -> list[int]:
        messages = stub.StreamGenerate(greedy(prompt, max_tokens), timeout=120)
        return [token for message in messages for token in message.token_ids]

    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(one, prompts))


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_unified_worker_with_two_replicas(service: Service, oracle: Oracle) -> None:
    worker = service.worker("unified", *TWO).wait_ready()
    assert worker.ready["data_size"] == 2
    ranks = worker.children("tandem.worker.rank_main")
    assert len(ranks) == 2
    half = 24 << 20
    assert worker.ready["num_pages"] == 2 * (half // worker.ready["page_bytes"]), "pool_bytes is for both together"
    assert worker.ready["max_total_num_tokens"] == worker.ready["num_pages"] // 2 * worker.ready["page_tokens"]
    stub = service.stub(service.gateway([], [worker]))
    source = random.Random(21)
    prompts = [random_prompt(source, source.randint(1, 120)) for _ in range(12)]
    for prompt, output in zip(prompts, ask(stub, prompts, 16), strict=True):
        oracle.check(prompt, output, 16)
    worker.wait_metric(lambda program: program.worker_metric("ended_requests") == len(prompts))
    assert worker.pages_in_use() == 0
    generated = by_replica(worker, "generated_tokens_total")
    assert min(generated) > 0.25 * sum(generated), generated
    assert sum(generated) == worker.worker_metric("generated_tokens")
    talk = random_prompt(source, 160)
    before = by_replica(worker, "prefix_hit_tokens_total")
    for _ in range(4):
        (output,) = ask(stub, [talk], 4)
        oracle.check(talk, output, 4)
        talk = talk + output + random_prompt(source, 20)
    worker.wait_metric(lambda program: program.worker_metric("ended_requests") == len(prompts) + 4)
    grown = [after - was for after, was in zip(by_replica(worker, "prefix_hit_tokens_total"), before, strict=True)]
    assert min(grown) == 0 and max(grown) >= 3 * 160, "a conversation stays where its beginning is"
    _kill_a_replica(worker, ranks)


def _kill_a_replica(worker: Program, ranks: list[int]) -> None:
    psutil.Process(ranks[1]).send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert worker.process.wait(25.0) == 1
    assert time.monotonic() - began < SOON
    assert "rank 0 of replica 1 ended by signal 9" in worker.log()
    assert all(is_gone(pid) for pid in ranks)


def test_two_replicas_prefill_for_two_that_decode(service: Service, oracle: Oracle) -> None:
    tcp = ("--transfer.transport", "tcp")
    prefill = service.worker("prefill", *tcp, *TWO)
    decode = service.worker("decode", *tcp, *TWO)
    for worker in (prefill, decode):
        worker.wait_ready()
        assert len(worker.children("tandem.transfer.main")) == 2, "each replica has a transfer process of its own"
    stub = service.stub(service.gateway([prefill], [decode]))
    source = random.Random(22)
    prompts = [random_prompt(source, source.randint(1, 200)) for _ in range(16)]
    for prompt, output in zip(prompts, ask(stub, prompts, 12), strict=True):
        oracle.check(prompt, output, 12)
    for worker in (prefill, decode):
        worker.wait_metric(lambda program: program.pages_in_use() == 0)
        assert worker.worker_metric("orphaned_pages") == worker.worker_metric("leases_started") == 0
    assert decode.worker_metric("local_prefills") == 0
    for worker, name in ((prefill, "computed_tokens_total"), (decode, "generated_tokens_total")):
        shares = by_replica(worker, name)
        assert min(shares) > 0.2 * sum(shares), (worker.name, shares)
    (victim, _) = prefill.children("tandem.worker.rank_main")
    psutil.Process(victim).send_signal(signal.SIGKILL)
    for prompt, output in zip(prompts, ask(stub, prompts[:4], 12), strict=False):
        oracle.check(prompt, output, 12)
    assert prefill.process.wait(SOON) == 1
    assert decode.stop() == 0


def test_replicas_of_two_ranks_each(service: Service, oracle: Oracle) -> None:
    """Two copies of two tensor ranks prefill for a plain decode worker: four transfer processes, one hand-off peer."""
    tcp = ("--transfer.transport", "tcp")
    prefill = service.worker("prefill", *tcp, *TWO, "--parallel.tensor-size", "2")
    decode = service.worker("decode", *tcp)
    for worker in (prefill, decode):
        worker.wait_ready()
    followers = prefill.children("tandem.worker.follower_main")
    assert (len(followers), len(prefill.children("tandem.transfer.main"))) == (2, 4)
    stub = service.stub(service.gateway([prefill], [decode]))
    source = random.Random(23)
    prompts = [random_prompt(source, source.randint(1, 150)) for _ in range(8)]
    for prompt, output in zip(prompts, ask(stub, prompts, 8), strict=True):
        oracle.check(prompt, output, 8)
    assert decode.worker_metric("local_prefills") == 0
    prefill.wait_metric(lambda program: program.pages_in_use() == 0)
    assert min(by_replica(prefill, "computed_tokens_total")) > 0
    psutil.Process(followers[1]).send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert prefill.process.wait(25.0) == 1
    assert time.monotonic() - began < SOON
    assert "rank 1 ended by signal 9" in prefill.log() and "replica 1" in prefill.log()

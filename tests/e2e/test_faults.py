"""What goes wrong in production, done to real processes: the answers stay exact and nothing stays behind."""

from __future__ import annotations

import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tandem.core.token_ids import pack
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import FREE_SECONDS, Program, Service
from tests.e2e.streams import TCP
from tests.e2e.wired import Wired
from tests.fakes.transport_proxy import Faults

MOONCAKE = ("--transfer.transport", "mooncake-tcp", "--transfer.trusted-network", "true")
over_each_transport = pytest.mark.parametrize(
    "transport", [pytest.param(TCP, id="tcp"), pytest.param(MOONCAKE, id="mooncake", marks=pytest.mark.mooncake)]
)
LONG = 3000  # tokens of a prompt that computes for seconds on such a worker, which hands nothing over before:
SLOW = ("--model.ops", "reference", "--scheduler.budget-tokens", "1")


def collect(stub: InferenceServiceStub, prompt: list[int], max_tokens: int, timeout: float = 60.0) -> list[int]:
    output: list[int] = []
    for message in stub.StreamGenerate(greedy(prompt, max_tokens), timeout=timeout):
        output.extend(message.token_ids)
    return output


def all_free(*workers: Program, seconds: float = FREE_SECONDS) -> None:
    for worker in workers:
        worker.wait_metric(lambda program: program.pages_in_use() == 0, seconds)
        assert worker.worker_metric("orphaned_pages") == 0


# ---- the client goes away -------------------------------------------------------------------------------------------


@over_each_transport
def test_cancel_while_prefill_computes(slow_service: Service, transport: tuple[str, ...]) -> None:
    prefill = slow_service.worker("prefill", *transport, *SLOW)
    decode = slow_service.worker("decode", *transport).wait_ready()
    prefill.wait_ready()
    stub = slow_service.stub(slow_service.gateway([prefill], [decode]))
    call = stub.StreamGenerate(greedy(random_prompt(random.Random(1), LONG), 8))
    prefill.wait_metric(lambda program: program.worker_metric("running_requests") == 1)
    call.cancel()
    all_free(prefill, decode)
    assert prefill.worker_metric("computed_tokens") < LONG, "it was computed to the end before the cancel"
    assert prefill.worker_metric("leases_started") == 0


def test_cancel_while_pages_are_pulled(service: Service, wired: Callable[..., Wired]) -> None:
    one = wired()
    decode = service.worker("decode", *TCP).wait_ready()
    prefill = one.prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    call = stub.StreamGenerate(greedy(random_prompt(random.Random(2), 500), 8))
    assert one.proxy.has_stalled.wait(20)
    decode.wait_metric(lambda program: program.worker_metric("transfers_inflight") == 1)
    call.cancel()
    all_free(decode, prefill)
    assert prefill.worker_metric("leases_started") == 0


@over_each_transport
def test_cancel_while_decode_decodes(service: Service, transport: tuple[str, ...]) -> None:
    prefill = service.worker("prefill", *transport)
    decode = service.worker("decode", *transport).wait_ready()
    prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    request = greedy(random_prompt(random.Random(3), 100), 2000)
    request.stop.ignore_eos = True
    call = stub.StreamGenerate(request)
    for _ in range(5):
        next(call)
    call.cancel()
    all_free(decode, prefill)
    assert prefill.worker_metric("leases_started") == 0


def test_a_deadline_ends_it_on_both_workers(slow_service: Service) -> None:
    prefill = slow_service.worker("prefill", *TCP, *SLOW)
    decode = slow_service.worker("decode", *TCP).wait_ready()
    prefill.wait_ready()
    stub = slow_service.stub(slow_service.gateway([prefill], [decode]))
    with pytest.raises(grpc.RpcError) as caught:
        collect(stub, random_prompt(random.Random(4), LONG), 8, timeout=0.4)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    all_free(prefill, decode)
    assert prefill.worker_metric("computed_tokens") < LONG


# ---- processes die --------------------------------------------------------------------------------------------------


@over_each_transport
def test_prefill_killed_while_it_computes(
    slow_service: Service, slow_made: tuple[Path, Oracle], transport: tuple[str, ...]
) -> None:
    prefill = slow_service.worker("prefill", *transport, *SLOW)
    decode = slow_service.worker("decode", *transport).wait_ready()
    prefill.wait_ready()
    stub = slow_service.stub(slow_service.gateway([prefill], [decode]))
    prompt = random_prompt(random.Random(5), LONG)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(collect, stub, prompt, 12)
        prefill.wait_metric(lambda program: program.worker_metric("running_requests") == 1)
        prefill.kill()
        slow_made[1].check(prompt, answer.result(60), 12)
    decode.wait_metric(lambda program: program.worker_metric("local_prefills") == 1)
    all_free(decode)


def test_prefill_killed_during_the_pull(service: Service, oracle: Oracle, wired: Callable[..., Wired]) -> None:
    one = wired()
    spare = service.worker("prefill", *TCP)
    decode = service.worker("decode", *TCP).wait_ready()
    prefill = one.prefill.wait_ready()
    spare.wait_ready()
    prompt = random_prompt(random.Random(6), 400)
    stub = service.stub(service.gateway([prefill, spare], [decode], "--gateway.prefill-peers", "2"))
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(collect, stub, prompt[index:], 12) for index in range(2)]
        assert one.proxy.has_stalled.wait(20)
        prefill.kill()
        one.proxy.close()
        for index, answer in enumerate(answers):
            oracle.check(prompt[index:], answer.result(60), 12)
    all_free(decode, spare)


def test_decode_killed_during_the_pull(service: Service, oracle: Oracle, wired: Callable[..., Wired]) -> None:
    """Lease; a second Open with a higher attempt pulls the same pages; nothing is computed twice."""
    one = wired("--handoff.lease-seconds", "30")
    first, second = service.worker("decode", *TCP), service.worker("decode", *TCP)
    prefill = one.prefill.wait_ready()
    first.wait_ready(), second.wait_ready()
    prompt = random_prompt(random.Random(7), 400)
    handoff_id = secrets.token_bytes(16)
    with grpc.insecure_channel(first.address) as channel:
        call = WorkerServiceStub(channel).Generate(submit(prefill, prompt, handoff_id, attempt=1))
        assert one.proxy.has_stalled.wait(20)
        prefill.wait_metric(lambda program: program.worker_metric("computed_tokens") >= len(prompt))
        first.kill()
        del call
    prefill.wait_metric(lambda program: program.worker_metric("leased_handoffs") == 1)
    computed = prefill.worker_metric("computed_tokens")
    one.proxy.release()
    with grpc.insecure_channel(second.address) as channel:
        output: list[int] = []
        for message in WorkerServiceStub(channel).Generate(submit(prefill, prompt, handoff_id, attempt=2)):
            output.extend(message.delta.token_ids)
    oracle.check(prompt, output, 12)
    assert prefill.worker_metric("computed_tokens") == computed
    assert second.worker_metric("local_prefills") == 0
    all_free(prefill, second)


def test_a_lease_ends(service: Service, wired: Callable[..., Wired]) -> None:
    one = wired("--handoff.lease-seconds", "6")
    decode = service.worker("decode", *TCP).wait_ready()
    prefill = one.prefill.wait_ready()
    with grpc.insecure_channel(decode.address) as channel:
        prompt = random_prompt(random.Random(8), 400)
        call = WorkerServiceStub(channel).Generate(submit(prefill, prompt, secrets.token_bytes(16), attempt=1))
        assert one.proxy.has_stalled.wait(20)
        decode.kill()
        del call
    prefill.wait_metric(keeps_pages_for_a_lease)
    all_free(prefill, seconds=6 + FREE_SECONDS)
    assert prefill.worker_metric("leases_expired") == 1


def keeps_pages_for_a_lease(program: Program) -> bool:
    found = program.metrics()
    leased = sum(value for name, value in found.items() if name.startswith("tandem_worker_leased_handoffs"))
    return leased == 1 and any('state="held"' in name and value > 0 for name, value in found.items())


def submit(prefill: Program, prompt: list[int], handoff_id: bytes, attempt: int) -> worker_pb.GenerateRequest:
    return worker_pb.GenerateRequest(
        submit=worker_pb.Submit(
            rid=1,
            request_id="e2e",
            prompt_token_ids=pack(prompt),
            sampling=pb.SamplingParams(temperature=0.0, max_tokens=12),
            prefill=[
                worker_pb.PrefillPeer(
                    handoff_address=prefill.address,
                    instance_id=bytes.fromhex(prefill.ready["instance_id"]),
                    handoff_id=handoff_id,
                    attempt=attempt,
                )
            ],
        )
    )


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_transfer_process_killed(service: Service, oracle: Oracle, wired: Callable[..., Wired], side: str) -> None:
    # What the killed process had sent may still verify: then Release crosses the end of the stream, and a lease runs.
    one = wired("--handoff.lease-seconds", "8")
    decode = service.worker("decode", *TCP).wait_ready()
    prefill = one.prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    prompt = random_prompt(random.Random(9), 500)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(collect, stub, prompt, 12)
        assert one.proxy.has_stalled.wait(20)
        (victim,) = (prefill if side == "prefill" else decode).children("tandem.transfer")
        os.kill(victim, signal.SIGKILL)
        one.proxy.release()
        oracle.check(prompt, answer.result(60), 12)
    assert decode.worker_metric("local_prefills") == 0, "attached again, nothing computed twice"
    all_free(prefill, decode, seconds=8 + FREE_SECONDS)
    oracle.check(prompt, collect(stub, prompt, 12), 12)


def test_a_dead_rank_takes_its_worker_down(service: Service) -> None:
    worker = service.worker("unified", "--server.drain-seconds", "60").wait_ready()
    (rank,) = worker.children("tandem.worker.rank_main")
    os.kill(rank, signal.SIGKILL)
    assert worker.process.wait(20) == 1
    assert "signal 9" in worker.log()


# ---- peers that hang, bytes that change -----------------------------------------------------------------------------


def test_a_stopped_decode_worker_stalls_nobody_else(
    service: Service, oracle: Oracle, wired: Callable[..., Wired]
) -> None:
    one = wired()
    hung, other = service.worker("decode", *TCP), service.worker("decode", *TCP)
    prefill = one.prefill.wait_ready()
    hung.wait_ready(), other.wait_ready()
    everybody = [hung.process.pid, *hung.children("tandem")]
    prompts = [random_prompt(random.Random(seed), 300) for seed in range(4)]
    with grpc.insecure_channel(hung.address) as channel:
        calls = [
            WorkerServiceStub(channel).Generate(submit(prefill, prompt, secrets.token_bytes(16), attempt=1))
            for prompt in prompts
        ]
        assert one.proxy.has_stalled.wait(20)
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        one.proxy.release()
        stub = service.stub(service.gateway([prefill], [other]))
        seconds = 0.0
        for seed in range(20, 26):
            prompt = random_prompt(random.Random(seed), 200)
            began = time.monotonic()
            output = collect(stub, prompt, 12)
            seconds += time.monotonic() - began
            oracle.check(prompt, output, 12)
        assert seconds < 20.0, "less than the patience with one that hangs"
        assert other.worker_metric("local_prefills") == 0
        for pid in everybody:
            os.kill(pid, signal.SIGCONT)
        for prompt, call in zip(prompts, calls, strict=True):
            output = [token for message in call for token in message.delta.token_ids]
            oracle.check(prompt, output, 12)


def test_a_flipped_bit_on_the_wire(service: Service, oracle: Oracle, wired: Callable[..., Wired]) -> None:
    one = wired(faults=Faults(flip_at=50_000, num_faulty=1))
    decode = service.worker("decode", *TCP).wait_ready()
    prefill = one.prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    prompt = random_prompt(random.Random(10), 400)
    oracle.check(prompt, collect(stub, prompt, 12), 12)
    decode.wait_metric(lambda program: program.worker_metric("checksum_mismatches") == 1)
    assert decode.worker_metric("local_prefills") == 0
    all_free(prefill, decode)


# ---- stopping -------------------------------------------------------------------------------------------------------


def test_drain_finishes_what_runs(service: Service, oracle: Oracle) -> None:
    prefill = service.worker("prefill", *TCP)
    decode = service.worker("decode", *TCP).wait_ready()
    prefill.wait_ready()
    gateway = service.gateway([prefill], [decode])
    stub = service.stub(gateway)
    prompt = random_prompt(random.Random(12), 100)
    call = stub.StreamGenerate(greedy(prompt, 200))
    output: list[int] = []
    while len(output) < 2:  # the second token is decode's own: before it, a draining decode worker hands back
        output.extend(next(call).token_ids)
    codes: dict[str, int] = {}
    stopping = [
        threading.Thread(target=lambda program=program: codes.update({program.name: program.stop()}))
        for program in (prefill, decode, gateway)
    ]
    for thread in stopping:
        thread.start()
    for message in call:
        output.extend(message.token_ids)
    oracle.check(prompt, output, 200)
    for thread in stopping:
        thread.join()
    assert codes == {"prefill": 0, "decode": 0, "gateway": 0}

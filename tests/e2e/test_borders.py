"""Bad input, bad pairs, bad configuration, and idleness: each answered clearly, and nobody else disturbed."""

from __future__ import annotations

import random
import secrets
import socket
import threading
import time
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.e2e.oracle import CONTEXT, VOCABULARY, Oracle, greedy, random_prompt
from tests.e2e.service import Program, Service
from tests.e2e.streams import TCP
from tests.e2e.test_faults import all_free, collect, submit

TEXT = "def main(argv):\n"
BAD = {
    "empty prompt": pb.GenerateRequest(text=""),
    "no prompt": pb.GenerateRequest(),
    "longer than the context": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (CONTEXT + 1))),
    "id out of the vocabulary": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[VOCABULARY])),
    "10 MB of text": pb.GenerateRequest(text="x" * 10_000_000),
    "negative temperature": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(temperature=-1.0)),
    "temperature nan": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(temperature=float("nan"))),
    "top_p 0": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(top_p=0.0)),
    "top_p above 1": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(top_p=1.5)),
    "top_k below -1": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(top_k=-2)),
    "max_tokens beyond the context": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(max_tokens=CONTEXT)),
    "bias outside the vocabulary": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(logit_bias={5000: 1.0})),
    "unsupported grammar": pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParams(regex="a+")),
}


def test_bad_requests_are_refused_and_disturb_nobody(service: Service, oracle: Oracle) -> None:
    prefill, decode = service.worker("prefill", *TCP), service.worker("decode", *TCP)
    prefill.wait_ready(), decode.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    prompt = random_prompt(random.Random(1), 100)
    request = greedy(prompt, 400)
    request.stop.ignore_eos = True
    good: list[int] = []
    reader = threading.Thread(
        target=lambda: good.extend(token for message in stub.StreamGenerate(request) for token in message.token_ids)
    )
    reader.start()
    for name, bad in BAD.items():
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(bad, timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, f"{name}: {caught.value}"
        assert caught.value.details(), name
    reader.join()
    assert len(good) == 400
    all_free(prefill, decode)


@pytest.mark.parametrize(
    ("role", "flags", "reason"),
    [
        ("decode", ("--cache.page-tokens", "64"), "page"),
        ("decode", ("--model.dtype", "bfloat16"), "dtype"),
    ],
)
def test_unlike_workers_do_not_pair(
    service: Service, oracle: Oracle, role: str, flags: tuple[str, ...], reason: str
) -> None:
    """The gateway pairs equals only; a decode worker that is told to pair all the same computes the prompt itself."""
    prefill, decode = service.worker("prefill", *TCP), service.worker(role, *TCP, *flags)
    prefill.wait_ready(), decode.wait_ready()
    assert prefill.ready["fingerprint"] != decode.ready["fingerprint"], reason
    prompt = random_prompt(random.Random(2), 64)
    with grpc.insecure_channel(decode.address) as channel:
        call = WorkerServiceStub(channel).Generate(submit(prefill, prompt, secrets.token_bytes(16), attempt=1))
        output = [token for message in call for token in message.delta.token_ids]
    assert len(output) == 12
    if reason == "page":
        oracle.check(prompt, output, 12)
    decode.wait_metric(lambda program: program.worker_metric("local_prefills") == 1)
    assert "fingerprint" in decode.log(), "the reason is in the log"
    all_free(prefill, decode)
    stub = service.stub(service.gateway([prefill], [decode]))
    assert len(collect(stub, prompt, 4)) > 0
    assert decode.worker_metric("local_prefills") == 1, "the gateway did not name the prefill worker"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--transfer.transport", "mooncake-rdma", "--transfer.trusted-network", "true"), "RDMA"),
        (("--transfer.transport", "mooncake-tcp"), "trusted_network"),
        (("--scheduler.budget-tokens", "0", "--cache.page-tokens", "x"), "page_tokens"),
        (("--schedule.loop", "normal"), "schedule"),
    ],
)
def test_a_configuration_that_cannot_be_served(service: Service, flags: tuple[str, ...], said: str) -> None:
    worker = service.worker("prefill", *flags)
    assert worker.process.wait(60) == 2
    assert said.replace("_", "-") in worker.log().replace("_", "-")
    assert "Traceback" not in worker.log()


def test_every_program_has_health_and_reflection(service: Service) -> None:
    prefill, decode = service.worker("prefill", *TCP), service.worker("decode", *TCP)
    prefill.wait_ready(), decode.wait_ready()
    gateway = service.gateway([prefill], [decode])
    for program, name in (
        (prefill, "tandem.handoff.v1.HandoffService"),
        (decode, "tandem.worker.v1.WorkerService"),
        (gateway, "tandem.inference.v1.InferenceService"),
    ):
        assert status_of(program, name) == health_pb2.HealthCheckResponse.SERVING
        assert name in reflected(program)


def status_of(program: Program, name: str) -> int:
    with grpc.insecure_channel(program.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
    return int(response.status)


def reflected(program: Program) -> list[str]:
    with grpc.insecure_channel(program.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        (listed,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = [service.name for service in listed.list_services_response.service]
        asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
        for answer in stub.ServerReflectionInfo(iter(asked)):
            assert FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0]).service
    return names


def test_idle_programs_sleep(service: Service) -> None:
    """No busy wait: a service that nobody uses takes a few milliseconds of CPU a second."""
    prefill, decode = service.worker("prefill", *TCP), service.worker("decode", *TCP)
    prefill.wait_ready(), decode.wait_ready()
    gateway = service.gateway([prefill], [decode])
    stub = service.stub(gateway)
    collect(stub, random_prompt(random.Random(3), 50), 8)
    time.sleep(1.0)
    everybody = [process for program in (prefill, decode, gateway) for process in family(program)]

    def used_a_second() -> float:
        before = sum(cpu_seconds(process) for process in everybody)
        time.sleep(2.0)
        return (sum(cpu_seconds(process) for process in everybody) - before) / 2.0

    used = min(used_a_second() for _ in range(3))  # what is left of the start may be late; what is busy, always is
    assert used < 0.1, f"{used:.3f} CPU seconds a second in {len(everybody)} idle processes"


def family(program: Program) -> list[psutil.Process]:
    root = psutil.Process(program.process.pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def test_no_worker_without_a_transport(service: Service) -> None:
    """The KV port is taken: the worker says so and ends, instead of taking requests that it cannot hand over."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worker = service.worker("prefill", *TCP, "--transfer.port", str(taken.getsockname()[1]))
        assert worker.process.wait(60) == 1
    assert "no transport came up" in worker.log()
    assert "in use" in worker.log()

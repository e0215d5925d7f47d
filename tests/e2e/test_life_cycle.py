"""Probes and the end of programs, on real processes: what an orchestrator sees and does."""

from __future__ import annotations

import time
import urllib.error
import urllib.request

import grpc
import pytest

from tandem.rpc.gen.handoff.v1.handoff_service_pb2 import HandoffRequest
from tandem.rpc.gen.handoff.v1.handoff_service_pb2_grpc import HandoffServiceStub
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.e2e.oracle import Oracle
from tests.e2e.service import Program, Service


def probe(program: Program, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{program.ready['metrics_port']}{path}"
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().strip()


def ask(length: int = 8) -> pb.GenerateRequest:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(5, 25)))
    request.sampling.temperature = 0.0
    request.sampling.max_tokens = length
    request.stop.ignore_eos = True
    request.output.return_token_ids = True
    request.output.no_text = True
    return request


def test_probes_tell_ready_from_alive_and_name_what_is_missing(service: Service) -> None:
    decode = service.worker("decode").wait_ready()
    gateway = service.gateway([], [decode], "--server.metrics-port", "0")
    assert probe(decode, "/readyz") == probe(gateway, "/readyz") == (200, "ok")
    decode.kill()
    deadline = time.monotonic() + 10
    while probe(gateway, "/readyz")[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert probe(gateway, "/readyz") == (503, "no decode or unified worker is ready")
    assert probe(gateway, "/livez") == (200, "ok"), "the gateway is well, its peers are not"


def test_handoffs_on_a_port_of_their_own(service: Service, oracle: Oracle) -> None:
    prefill = service.worker("prefill", "--server.handoff-port", "0").wait_ready()
    decode = service.worker("decode").wait_ready()
    gateway = service.gateway([prefill], [decode])
    (choice,) = service.stub(gateway).Generate(ask(), timeout=60).choices
    oracle.check(list(range(5, 25)), list(choice.token_ids), 8)
    decode.wait_metric(lambda program: program.worker_metric("transferred_bytes") > 0, 3.0)
    with grpc.insecure_channel(prefill.address) as channel:
        call = HandoffServiceStub(channel).Handoff(iter([HandoffRequest()]), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "gateways' port knows no hand-offs"


def test_a_stopping_gateway_takes_what_still_comes_then_finishes(service: Service, oracle: Oracle) -> None:
    decode = service.worker("decode").wait_ready()
    gateway = service.gateway([], [decode], "--server.metrics-port", "0", "--server.drain-delay-seconds", "20")
    stub = service.stub(gateway)
    stub.Generate(ask(), timeout=60)
    gateway.process.terminate()
    deadline = time.monotonic() + 15
    while probe(gateway, "/readyz") != (503, "draining"):
        assert time.monotonic() < deadline
    (choice,) = stub.Generate(ask(), timeout=60).choices
    oracle.check(list(range(5, 25)), list(choice.token_ids), 8)
    assert probe(gateway, "/livez") == (200, "ok")
    assert gateway.stop() == 0  # the second signal ends the delay


def test_a_stopping_prefill_worker_serves_what_it_announced(service: Service, oracle: Oracle) -> None:
    prefill = service.worker("prefill").wait_ready()
    decode = service.worker("decode").wait_ready()
    gateway = service.gateway([prefill], [decode])
    stub = service.stub(gateway)
    calls = [stub.Generate.future(ask(40), timeout=60) for _ in range(8)]
    prefill.process.terminate()
    for call in calls:
        (choice,) = call.result().choices
        oracle.check(list(range(5, 25)), list(choice.token_ids), 40)
    assert prefill.stop() == 0

"""Traces end to end: one request is one trace over three real programs, whatever happens to its collector."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import grpc
import pytest

from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Service, free_port
from tests.e2e.streams import TCP
from tests.e2e.test_faults import collect
from tests.fakes.collector import Collector, Seen

TRACE_ID, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENT_SPAN}-01"
ATTRIBUTES = {  # everything that a span may say: ids, names of workers, sizes, seconds and codes
    *("request_id", "handoff_id", "attempt", "peer", "api", "code", "reason", "finish", "end_reason", "resumptions"),
    *("prompt_tokens", "completion_tokens", "cached_tokens", "resumed_tokens", "tokens_held", "pages"),
    *("kv_bytes", "kv_transport", "transport", "transfer_bytes", "prefill_worker", "decode_worker"),
    *("seconds", "ttft", "tpot", "queue", "prefill", "transfer", "first_decode"),
}
EXPECTED = {  # name of each span of a handed-off answer, by service, and its parent's
    ("tandem-gateway", "tandem.inference.v1.InferenceService/StreamGenerate"): None,
    ("tandem-decode", "request"): ("tandem-gateway", "tandem.inference.v1.InferenceService/StreamGenerate"),
    ("tandem-decode", "queue"): ("tandem-decode", "request"),
    ("tandem-decode", "handoff"): ("tandem-decode", "request"),
    ("tandem-decode", "pull"): ("tandem-decode", "handoff"),
    ("tandem-decode", "decode"): ("tandem-decode", "request"),
    ("tandem-prefill", "handoff"): ("tandem-decode", "handoff"),
    ("tandem-prefill", "queue"): ("tandem-prefill", "handoff"),
    ("tandem-prefill", "prefill"): ("tandem-prefill", "handoff"),
}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def flags(endpoint: str, *more: str) -> tuple[str, ...]:
    return ("--telemetry.otlp-endpoint", endpoint, *more)


def start(service: Service, endpoint: str, *more: str) -> InferenceServiceStub:
    prefill = service.worker("prefill", *TCP, *flags(endpoint))
    decode = service.worker("decode", *TCP, *flags(endpoint)).wait_ready()
    prefill.wait_ready()
    return service.stub(service.gateway([prefill], [decode], *flags(endpoint, *more)))


def ask(stub: InferenceServiceStub, prompt: list[int], max_tokens: int, *metadata: tuple[str, str]) -> list[int]:
    output: list[int] = []
    for message in stub.StreamGenerate(greedy(prompt, max_tokens), timeout=60, metadata=metadata):
        output.extend(message.token_ids)
    return output


def of_trace(spans: list[Seen], trace_id: str) -> list[Seen]:
    return [span for span in spans if span.trace_id == trace_id]


def test_one_request_is_one_trace_over_three_programs(service: Service, oracle: Oracle, collector: Collector) -> None:
    stub = start(service, collector.endpoint)
    prompt = random_prompt(random.Random(1), 300)
    output = ask(stub, prompt, 24, ("traceparent", TRACEPARENT), ("x-request-id", "request-7"))
    oracle.check(prompt, output, 24)
    spans = collector.wait(lambda spans: len(of_trace(spans, TRACE_ID)) >= len(EXPECTED))
    found = {(span.service, span.name): span for span in spans}
    assert found.keys() == EXPECTED.keys()
    assert len(spans) == len(EXPECTED)  # each once, and all of this trace
    for key, parent_key in EXPECTED.items():
        span = found[key]
        assert span.begin_ns < span.end_ns
        if parent_key is None:
            assert span.parent_id == CLIENT_SPAN
            continue
        parent = found[parent_key]
        assert span.parent_id == parent.span_id, key
        assert parent.begin_ns <= span.begin_ns <= span.end_ns <= parent.end_ns, key
    gateway = found["tandem-gateway", "tandem.inference.v1.InferenceService/StreamGenerate"]
    assert gateway.attributes["tandem.request_id"] == "request-7"
    assert (gateway.attributes["tandem.prompt_tokens"], gateway.attributes["tandem.code"]) == (300, "OK")
    request = found["tandem-decode", "request"]
    assert request.attributes["tandem.completion_tokens"] == len(output)
    assert request.attributes["tandem.kv_transport"] == "tcp"
    assert request.attributes["tandem.kv_bytes"] > 0
    ids = {found[service, "handoff"].attributes["tandem.handoff_id"] for service in ("tandem-decode", "tandem-prefill")}
    assert len(ids) == 1
    names = {name.removeprefix("tandem.") for span in spans for name in span.attributes}
    assert names <= ATTRIBUTES, names - ATTRIBUTES


def test_every_request_has_a_trace_of_its_own_and_failures_are_marked(
    slow_service: Service, collector: Collector
) -> None:
    stub = start(slow_service, collector.endpoint)
    collect(stub, random_prompt(random.Random(2), 40), 4)
    collect(stub, random_prompt(random.Random(3), 40), 4)
    message = greedy(random_prompt(random.Random(4), 40), 3000)
    message.stop.ignore_eos = True
    call = stub.StreamGenerate(message)
    next(call)
    call.cancel()

    def roots(spans: list[Seen]) -> list[Seen]:
        return [span for span in spans if not span.parent_id]

    spans = collector.wait(lambda spans: len(roots(spans)) == 3 and any(span.error == "cancelled" for span in spans))
    assert len({span.trace_id for span in spans}) == 3
    assert {span.service for span in roots(spans)} == {"tandem-gateway"}
    assert sorted(span.error for span in roots(spans)) == ["", "", "CANCELLED"]
    assert [span.name for span in spans if span.error == "cancelled"] == ["request"]


def test_who_wants_no_trace_gets_none(service: Service, collector: Collector) -> None:
    stub = start(service, collector.endpoint, "--telemetry.trace-ratio", "0")
    collect(stub, random_prompt(random.Random(5), 40), 4)
    ask(stub, random_prompt(random.Random(6), 40), 4, ("traceparent", TRACEPARENT[:-1] + "0"))
    ask(stub, random_prompt(random.Random(7), 40), 4, ("traceparent", TRACEPARENT))
    collector.wait(lambda spans: len(spans) >= len(EXPECTED))
    time.sleep(1.5)  # a batch
    assert {span.trace_id for span in collector.spans} == {TRACE_ID}
    assert len(collector.spans) == len(EXPECTED)


def test_a_dead_collector_is_told_once_and_delays_nobody(service: Service, oracle: Oracle) -> None:
    stub = start(service, f"http://127.0.0.1:{free_port()}")
    for seed in range(3):
        prompt = random_prompt(random.Random(seed), 60)
        began = time.monotonic()
        output = ask(stub, prompt, 8)
        assert time.monotonic() - began < 20.0
        oracle.check(prompt, output, 8)
        time.sleep(1.0)
    gateway = service.programs[-1]
    deadline = time.monotonic() + 15
    while "takes no spans" not in gateway.log():
        assert time.monotonic() < deadline, gateway.log()
        time.sleep(0.1)
    for program in service.programs:
        began = time.monotonic()
        assert program.stop() == 0
        assert time.monotonic() - began < 15.0
        log = program.log_path.read_text()
        assert log.count("takes no spans") <= 1
        assert "opentelemetry" not in log


def test_a_gateway_without_traces_passes_a_clients_on(service: Service, collector: Collector) -> None:
    prefill = service.worker("prefill", *TCP, *flags(collector.endpoint))
    decode = service.worker("decode", *TCP).wait_ready()  # neither has this one
    prefill.wait_ready()
    stub = service.stub(service.gateway([prefill], [decode]))
    ask(stub, random_prompt(random.Random(8), 40), 4, ("traceparent", TRACEPARENT))
    with pytest.raises(grpc.RpcError):
        ask(stub, [], 4, ("traceparent", TRACEPARENT))
    spans = collector.wait(lambda spans: len(spans) >= 3)
    assert {span.service for span in spans} == {"tandem-prefill"}
    (handoff,) = [span for span in spans if span.name == "handoff"]
    assert (handoff.trace_id, handoff.parent_id) == (TRACE_ID, CLIENT_SPAN)

"""Bits through real processes: equal under one `numerics` id whatever happens, and what pods of two ids lose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.native.library import NativeUnavailable, load_library
from tandem.engine.ops.cpu import supported_kernels
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Program, Service
from tests.e2e.streams import LONG, TCP, Pair, request, resumed
from tests.e2e.test_faults import over_each_transport
from tests.e2e.twin import Twin

NUM_TOP = 5
BF16 = ("--model.dtype", "bfloat16")
PROMPTS = [random_prompt(random.Random(length), length) for length in (7, 90, 310)]

Logprobs = list[tuple[int, float, tuple[tuple[int, float], ...]]]


@pytest.fixture(scope="module")
def twin(made: tuple[Path, Oracle]) -> Twin:
    return exact_twin(made[0])


def exact_twin(folder: Path) -> Twin:
    twin = Twin(folder, dtype="bfloat16")
    if not twin.is_exact:
        pytest.skip("operators without a numerics id")
    return twin


def with_logprobs(prompt: list[int], max_tokens: int) -> pb.GenerateRequest:
    """A sampled request that asks for log-probabilities."""
    message = greedy(prompt, max_tokens)
    message.sampling.temperature, message.sampling.seed = 0.7, 5
    message.stop.ignore_eos = True
    message.output.logprobs = NUM_TOP
    return message


def figures(logprobs: Sequence[Any]) -> Logprobs:
    """What came over the wire; floats as they are."""
    return [(one.token_id, one.logprob, tuple((top.token_id, top.logprob) for top in one.top)) for one in logprobs]


def answer(stub: InferenceServiceStub, prompt: list[int], max_tokens: int = 24) -> Logprobs:
    (choice,) = stub.Generate(with_logprobs(prompt, max_tokens), timeout=60).choices
    assert len(choice.logprobs) == max_tokens
    return figures(choice.logprobs)


def expected(twin: Twin, prompt: list[int], answered: Logprobs) -> Logprobs:
    output = [token for token, _, _ in answered]
    found = twin.logprobs(prompt, output, NUM_TOP)
    return [(one.token_id, one.logprob or 0.0, one.top) for one in found]


@pytest.fixture
def undisturbed(service: Service, twin: Twin) -> list[Logprobs]:
    """Answers of a worker that computes prompts itself, one after another and whole."""
    unified = service.worker("unified", *BF16).wait_ready()
    stub = service.stub(service.gateway([], [unified]))
    found = [answer(stub, prompt) for prompt in PROMPTS]
    for prompt, logprobs in zip(PROMPTS, found, strict=True):
        assert logprobs == expected(twin, prompt, logprobs)
    return found


@over_each_transport
def test_a_hand_off_among_others_changes_no_bit(
    service: Service, undisturbed: list[Logprobs], transport: tuple[str, ...]
) -> None:
    """Chunked prompts, prefix hits on both sides, mixed batches, other threads, pages from another process."""
    prefill = service.worker("prefill", *transport, *BF16, "--scheduler.budget-tokens", "48")
    decode = service.worker("decode", *transport, *BF16, "--model.threads", "2", "--scheduler.loop", "normal")
    assert prefill.wait_ready().ready["numerics"] == decode.wait_ready().ready["numerics"] != ""
    stub = service.stub(service.gateway([prefill], [decode]))
    source = random.Random(4)
    others = [PROMPTS[2][: source.randint(1, 310)] + random_prompt(source, source.randint(1, 80)) for _ in range(40)]
    with ThreadPoolExecutor(16) as threads:
        crowd = [threads.submit(answer, stub, prompt, source.randint(2, 40)) for prompt in others]
        answers = [threads.submit(answer, stub, prompt) for prompt in [*PROMPTS, *PROMPTS]]
        assert [one.result() for one in answers] == undisturbed * 2
        for one in crowd:
            one.result()
    decode.wait_metric(lambda program: program.worker_metric("peer_handoffs") == len(others) + 2 * len(PROMPTS))
    assert decode.worker_metric("local_prefills") == 0
    assert prefill.worker_metric("prefix_hit_tokens") > 0
    assert decode.worker_metric("peer_numerics_differ") == 0


def test_retractions_change_no_bit(service: Service, undisturbed: list[Logprobs]) -> None:
    """So few pages that requests lose theirs and begin anew."""
    small = service.worker("unified", *BF16, "--cache.pool-bytes", str(60 * 16 * 4 * 2 * 2 * 16 * 2)).wait_ready()
    stub = service.stub(service.gateway([], [small]))
    source = random.Random(6)
    with ThreadPoolExecutor(16) as threads:
        crowd = [threads.submit(answer, stub, random_prompt(source, 40), 150) for _ in range(12)]
        answers = [threads.submit(answer, stub, prompt) for prompt in PROMPTS]
        assert [one.result() for one in answers] == undisturbed
        for one in crowd:
            one.result()
    assert small.worker_metric("retractions") > 0


def test_a_killed_decode_worker_changes_no_bit(slow_service: Service) -> None:
    twin = exact_twin(slow_service.checkpoint)
    pair = Pair(slow_service, *BF16, prefill_flags=BF16)
    message = request(PROMPTS[1], LONG)
    message.output.logprobs = NUM_TOP
    stormy, _ = pair.strike(message)
    found = figures(stormy.finish().logprobs)
    assert len(found) == LONG
    assert found == expected(twin, PROMPTS[1], found)
    assert resumed(pair.gateway, "worker_lost") == 1


# ---- two ids --------------------------------------------------------------------------------------------------------


def two_ids() -> tuple[str, str]:
    try:
        supported = supported_kernels(load_library())
    except NativeUnavailable as missing:
        pytest.skip(str(missing))
    if "avx2" not in supported:
        pytest.skip("no kernels for this CPU")
    return "cpu-avx2", "cpu-avx512bf16" if "avx512bf16" in supported else "reference"


def test_pods_of_two_ids_pair_and_cache_nothing_of_it(service: Service) -> None:
    prefill_ops, decode_ops = two_ids()
    prefill = service.worker("prefill", *TCP, *BF16, "--model.ops", prefill_ops).wait_ready()
    decode = service.worker("decode", *TCP, *BF16, "--model.ops", decode_ops).wait_ready()
    assert prefill.ready["numerics"] != decode.ready["numerics"]
    stub = service.stub(service.gateway([prefill], [decode]))
    pages = -(-len(PROMPTS[1]) // prefill.ready["page_tokens"])
    for _ in range(2):
        last = list(stub.StreamGenerate(greedy(PROMPTS[1], 40)))[-1]
        assert last.timing.kv_bytes == pages * prefill.ready["page_bytes"], "all of it again"
        assert last.timing.kv_transport == "tcp"
    decode.wait_metric(lambda program: program.worker_metric("peer_handoffs") == 2 and program.pages_in_use() == 0)
    assert decode.pages("cached") == 0
    assert decode.worker_metric("peer_numerics_differ") == 1
    assert _warnings(decode) == 1
    assert decode.worker_metric("local_prefills") == 0


def test_pods_of_one_id_cache_what_they_receive(service: Service) -> None:
    prefill_ops, _ = two_ids()
    prefill, decode = (service.worker(role, *TCP, *BF16, "--model.ops", prefill_ops) for role in ("prefill", "decode"))
    stub = service.stub(service.gateway([prefill.wait_ready()], [decode.wait_ready()]))
    moved = [list(stub.StreamGenerate(greedy(PROMPTS[1], 4)))[-1].timing.kv_bytes for _ in range(2)]
    assert 0 < moved[1] < moved[0]
    decode.wait_metric(lambda program: program.worker_metric("peer_handoffs") == 2 and program.pages_in_use() == 0)
    assert decode.pages("cached") > 0
    assert decode.worker_metric("peer_numerics_differ") == 0
    assert _warnings(decode) == 0


def _warnings(program: Program) -> int:
    return program.log().count("computes with numerics")

"""Decode workers that die or stop in the middle of streams, as real processes: nobody's answer changes."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import FREE_SECONDS, Service, free_port, wait_serving
from tests.e2e.streams import LONG, TCP, Pair, Reader, request, resumed, running, start_gateway
from tests.e2e.wired import Wired


@pytest.fixture
def service(slow_service: Service) -> Service:
    return slow_service


@pytest.fixture
def oracle(slow_made: tuple[Path, Oracle]) -> Oracle:
    return slow_made[1]


# ---- decode is killed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.0), (1, 0.9), (2, 0.9)])
def test_a_killed_decode_worker_changes_nothing(service: Service, n: int, temperature: float) -> None:
    pair = Pair(service)
    message = request(random_prompt(random.Random(1), 60), n=n, temperature=temperature)
    calm = Reader(pair.stub, message).finish()
    stormy, moved = pair.strike(message)
    stormy.finish()
    assert stormy.output == calm.output
    assert stormy.text == calm.text
    assert [len(output) for output in stormy.output.values()] == [LONG] * n
    assert stormy.last.usage.prompt_tokens == 60
    assert stormy.last.usage.completion_tokens == n * LONG
    assert resumed(pair.gateway, "worker_lost") == moved >= 1


def test_a_stop_string_over_the_cut(service: Service) -> None:
    pair = Pair(service)
    message = request(random_prompt(random.Random(2), 40))
    calm = Reader(pair.stub, message).finish().text[0]
    # Ends after the middle, and is the first of its kind.
    end = next(end for end in range(len(calm) * 2 // 3, len(calm)) if calm.find(calm[end - 12 : end]) == end - 12)
    message.stop.stop.append(calm[end - 12 : end])
    stormy, _ = pair.strike(message)
    stormy.finish()
    assert stormy.text[0] == calm[: end - 12]
    assert stormy.last.stop_string == calm[end - 12 : end]
    assert resumed(pair.gateway, "worker_lost") == 1


# Without prefix caches nothing but the hand-off's id leads the next attempt to the replica that has its pages.
_REPLICAS = ("--parallel.data-size", "2", "--cache.prefix-cache", "false")


@pytest.mark.parametrize(("how", "flags"), [("killed", ()), ("drained", ()), ("killed", _REPLICAS)])
def test_the_next_decode_worker_pulls_what_was_computed_once(
    service: Service, oracle: Oracle, wired: Callable[..., Wired], how: str, flags: Sequence[str]
) -> None:
    one = wired("--handoff.lease-seconds", "20", *flags)
    decodes = [service.worker("decode", *TCP, "--server.drain-seconds", "60") for _ in range(2)]
    prefill = one.prefill.wait_ready()
    for worker in decodes:
        worker.wait_ready()
    gateway = start_gateway(service, [prefill], decodes)
    prompt = random_prompt(random.Random(3), 400)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(lambda: Reader(service.stub(gateway), greedy(prompt, 12)).finish())
        assert one.proxy.has_stalled.wait(20)
        prefill.wait_metric(lambda program: program.worker_metric("computed_tokens") >= len(prompt))
        (_, victim), (_, other) = running(*decodes, metric="transfers_inflight")
        one.proxy.faults.num_faulty = 0
        if how == "killed":
            victim.kill()
        else:
            began = time.monotonic()
            assert victim.stop() == 0
            assert time.monotonic() - began < 15.0, "what only waits for a hand-off is handed back at once"
        oracle.check(prompt, answer.result(60).output[0], 12)
    assert prefill.worker_metric("computed_tokens") == len(prompt)
    assert other.worker_metric("local_prefills") == 0
    cause = "worker_lost" if how == "killed" else "drained"
    assert resumed(gateway, cause) == 1
    prefill.wait_metric(lambda program: program.pages_in_use() == 0, FREE_SECONDS)


# ---- decode stops ---------------------------------------------------------------------------------------------------


def test_a_drain_hands_streams_back_in_time(service: Service, oracle: Oracle) -> None:
    pair = Pair(service, "--server.drain-seconds", "0.3")
    prompts = [random_prompt(random.Random(seed), 20 + seed) for seed in range(20)]
    length = 1200
    readers = [Reader(pair.stub, request(prompt, length)) for prompt in prompts]
    for reader in readers:
        reader.wait(2)
    victim, other = pair.decodes
    began = time.monotonic()
    assert victim.stop() == 0
    seconds = time.monotonic() - began
    for number, (prompt, reader) in enumerate(zip(prompts, readers, strict=True)):
        output = reader.finish().output[0]
        assert len(output) == length
        if number % 5 == 0:  # of both workers: they got the requests in turns
            oracle.check(prompt, output, length)
    assert seconds > 0.2
    assert resumed(pair.gateway, "drained") >= 5, "they had their time, and no more"
    assert resumed(pair.gateway, "worker_lost") == 0
    other.wait_metric(lambda program: program.pages_in_use() == 0, FREE_SECONDS)


def test_the_only_decode_worker_is_waited_for(service: Service, oracle: Oracle) -> None:
    port = free_port()
    flags = (*TCP, "--server.port", str(port), "--server.drain-seconds", "0.2")
    prefill, decode = service.worker("prefill", *TCP), service.worker("decode", *flags).wait_ready()
    gateway = start_gateway(service, [prefill.wait_ready()], [decode])
    prompt = random_prompt(random.Random(5), 50)
    for _ in range(3):
        reader = Reader(service.stub(gateway), request(prompt))
        reader.wait(20)
        before, began = resumed(gateway, "drained"), time.monotonic()
        assert decode.stop() == 0
        decode = service.worker("decode", *flags).wait_ready()
        if time.monotonic() - began < 12.0:  # else the gateway has given up, or was about to
            oracle.check(prompt, reader.finish().output[0], LONG)
            if resumed(gateway, "drained") > before:
                return
        with contextlib.suppress(grpc.RpcError):
            reader.finish()
        wait_serving(gateway.address)
    pytest.fail("no replacement came in the middle of an answer and in time")


# ---- prefill dies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_spare", [False, True])
def test_prefill_killed_after_its_first_token_was_forwarded(
    service: Service, oracle: Oracle, wired: Callable[..., Wired], with_spare: bool
) -> None:
    one = wired()
    spare = [service.worker("prefill", *TCP)] if with_spare else []
    decode = service.worker("decode", *TCP).wait_ready()
    prefills = [one.prefill.wait_ready(), *(worker.wait_ready() for worker in spare)]
    stub = service.stub(service.gateway(prefills, [decode]))
    prompts = [random_prompt(random.Random(seed), 400) for seed in range(6, 10)]
    readers = [Reader(stub, greedy(prompt, 12)) for prompt in prompts]
    assert one.proxy.has_stalled.wait(20)
    for reader in readers:
        reader.wait(1)
    one.prefill.kill()
    one.proxy.close()
    for prompt, reader in zip(prompts, readers, strict=True):
        oracle.check(prompt, reader.finish().output[0], 12)
    if with_spare:
        assert decode.worker_metric("local_prefills") == 0
    decode.wait_metric(lambda program: program.pages_in_use() == 0, FREE_SECONDS)


# ---- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"max_resumptions": "1"}, "limit"),
        ({"resumption_burst": "1", "resumptions_per_second": "0.01"}, "budget"),
    ],
)
def test_a_bound_ends_the_stream_with_what_happened(service: Service, flags: dict[str, str], reason: str) -> None:
    pair = Pair(service, **flags)
    reader = Reader(pair.stub, request(random_prompt(random.Random(11), 40), 3000))
    reader.wait(20)
    (_, first), (_, second) = running(*pair.decodes)
    first.kill()
    reader.wait(reader.num_tokens + 20)
    second.kill()
    with pytest.raises(grpc.RpcError) as caught:
        reader.finish()
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert resumed(pair.gateway, "worker_lost") == 1
    assert pair.gateway.metrics()[f'tandem_gateway_resumptions_refused_total{{reason="{reason}"}}'] == 1

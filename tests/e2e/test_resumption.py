"""Decode workers that die or stop in the middle of streams, as real processes: nobody's answer changes."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.oracle import SLOW_LLAMA, Oracle, greedy, make_checkpoint, random_prompt
from tests.e2e.service import Program, Service
from tests.e2e.twin import Twin
from tests.fakes.transport_proxy import FaultProxy, Faults

TCP = ("--transfer.transport", "tcp")
LONG = 800  # output tokens, seconds of this checkpoint, and figures are a tenth of a second late


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resumption") / "checkpoint"
    return folder, Oracle(make_checkpoint(folder, SLOW_LLAMA), Twin(folder))


@pytest.fixture(scope="module")
def oracle(made: tuple[Path, Oracle]) -> Oracle:
    return made[1]


def request(prompt: list[int], max_tokens: int = LONG, *, n: int = 1, temperature: float = 0.0) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=77, n=n),
        stop=pb.StopConditions(ignore_eos=True),
        output=pb.OutputOptions(return_token_ids=True, return_timing=True),
    )


class Reader:
    """Reads a stream in a thread of its own; `output[index]` and `text[index]` are what has come."""

    def __init__(self, stub: InferenceServiceStub, message: pb.GenerateRequest) -> None:
        self.output: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.logprobs: list[Any] = []  # of all outputs together
        self.last: Any = None
        self.error: grpc.RpcError | None = None
        self._call = stub.StreamGenerate(message, timeout=60)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self._call:
                self.last = message
                self.output.setdefault(message.index, []).extend(message.token_ids)
                self.logprobs.extend(message.logprobs)
                self.text[message.index] = self.text.get(message.index, "") + message.text
        except grpc.RpcError as error:
            self.error = error

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.output.values()))

    def wait(self, num_tokens: int) -> None:
        deadline = time.monotonic() + 30
        while self.num_tokens < num_tokens:
            assert time.monotonic() < deadline and self._thread.is_alive()
            time.sleep(0.002)

    def finish(self) -> Reader:
        self._thread.join(60)
        if self.error is not None:
            raise self.error
        return self


def start_gateway(service: Service, prefills: list[Program], decodes: list[Program], *flags: str) -> Program:
    return service.gateway(prefills, decodes, "--server.metrics-port", "0", *flags)


def free_port() -> int:
    """Return a port for a program that is started again on it, outside of the range of those that others get for 0."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(20000, 30000))) as probe:
            return int(probe.getsockname()[1])


def resumed(gateway: Program, cause: str) -> float:
    return gateway.metrics().get(f'tandem_gateway_resumptions_total{{cause="{cause}"}}', 0.0)


def running(*workers: Program, total: int = 1, metric: str = "running_requests") -> list[tuple[float, Program]]:
    """What each decodes, most first, once that is `total`; figures are a tenth of a second late."""
    deadline = time.monotonic() + 10
    while True:
        found = [(worker.worker_metric(metric), worker) for worker in workers]
        if sum(number for number, _ in found) == total:
            return sorted(found, key=lambda one: -one[0])
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


class Pair:
    """Two decode workers and a prefill worker."""

    def __init__(self, service: Service, *decode_flags: str, prefill_flags: Sequence[str] = (), **gateway: str) -> None:
        self.prefill = service.worker("prefill", *TCP, *prefill_flags)
        self.decodes = [service.worker("decode", *TCP, *decode_flags) for _ in range(2)]
        for worker in (self.prefill, *self.decodes):
            worker.wait_ready()
        flags = [word for name, value in gateway.items() for word in (f"--gateway.{name.replace('_', '-')}", value)]
        self.gateway = start_gateway(service, [self.prefill], self.decodes, *flags)
        self.stub = service.stub(self.gateway)


# ---- decode is killed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.0), (1, 0.9), (2, 0.9)])
def test_a_killed_decode_worker_changes_nothing(service: Service, n: int, temperature: float) -> None:
    pair = Pair(service)
    message = request(random_prompt(random.Random(1), 60), n=n, temperature=temperature)
    calm = Reader(pair.stub, message).finish()
    running(*pair.decodes, total=0)
    stormy = Reader(pair.stub, message)
    stormy.wait(40 * n)
    moved, victim = running(*pair.decodes, total=n)[0]
    victim.kill()
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
    running(*pair.decodes, total=0)
    stormy = Reader(pair.stub, message)
    stormy.wait(40)
    running(*pair.decodes)[0][1].kill()
    stormy.finish()
    assert stormy.text[0] == calm[: end - 12]
    assert stormy.last.stop_string == calm[end - 12 : end]
    assert resumed(pair.gateway, "worker_lost") == 1


class Wired:
    """A prefill worker whose KV port is reached through a proxy that stalls."""

    def __init__(self, service: Service, *flags: str) -> None:
        port = free_port()
        self.proxy = FaultProxy(f"127.0.0.1:{port}", Faults(stall_after=4096))
        self.prefill = service.worker(
            "prefill", *TCP, "--transfer.port", str(port), "--transfer.advertise-address", self.proxy.address, *flags
        )


@pytest.fixture
def wired(service: Service) -> Iterator[Callable[..., Wired]]:
    made: list[Wired] = []

    def make(*flags: str) -> Wired:
        made.append(Wired(service, *flags))
        return made[-1]

    yield make
    for one in made:
        one.proxy.close()


# Without prefix caches nothing but the hand-off's id leads the next attempt to the replica that has its pages.
_REPLICAS = ("--parallel.data-size", "2", "--cache.prefix-cache", "false")


@pytest.mark.parametrize(("how", "flags"), [("killed", ()), ("drained", ()), ("killed", _REPLICAS)])
def test_the_next_decode_worker_pulls_what_was_computed_once(
    service: Service, oracle: Oracle, wired: Callable[..., Wired], how: str, flags: Sequence[str]
) -> None:
    one = wired("--handoff.lease-seconds", "20", *flags)
    decodes = [service.worker("decode", *TCP) for _ in range(2)]
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
            assert time.monotonic() - began < 4.0, "what only waits for a hand-off is handed back at once"
        oracle.check(prompt, answer.result(60).output[0], 12)
    assert prefill.worker_metric("computed_tokens") == len(prompt)
    assert other.worker_metric("local_prefills") == 0
    cause = "worker_lost" if how == "killed" else "drained"
    assert resumed(gateway, cause) == 1
    prefill.wait_metric(lambda program: program.pages_in_use() == 0, 3.0)


# ---- decode stops ---------------------------------------------------------------------------------------------------


def test_a_drain_hands_streams_back_in_time(service: Service, oracle: Oracle) -> None:
    pair = Pair(service, "--server.drain-seconds", "1")
    prompts = [random_prompt(random.Random(seed), 20 + seed) for seed in range(20)]
    length = 600
    readers = [Reader(pair.stub, request(prompt, length)) for prompt in prompts]
    for reader in readers:
        reader.wait(2)
    victim, other = pair.decodes
    began = time.monotonic()
    assert victim.stop() == 0
    seconds = time.monotonic() - began
    for prompt, reader in zip(prompts, readers, strict=True):
        output = reader.finish().output[0]
        assert len(output) == length
        oracle.check(prompt, output, length)
    assert 0.5 < seconds < 4.0
    assert resumed(pair.gateway, "drained") >= 5
    assert resumed(pair.gateway, "worker_lost") == 0
    other.wait_metric(lambda program: program.pages_in_use() == 0, 3.0)


def test_the_only_decode_worker_is_waited_for(service: Service, oracle: Oracle) -> None:
    port = free_port()
    flags = (*TCP, "--server.port", str(port), "--server.drain-seconds", "0.2")
    prefill, decode = service.worker("prefill", *TCP), service.worker("decode", *flags).wait_ready()
    gateway = start_gateway(service, [prefill.wait_ready()], [decode])
    prompt = random_prompt(random.Random(5), 50)
    reader = Reader(service.stub(gateway), request(prompt))
    reader.wait(20)
    assert decode.stop() == 0
    service.worker("decode", *flags).wait_ready()
    oracle.check(prompt, reader.finish().output[0], LONG)
    assert resumed(gateway, "drained") == 1


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
    decode.wait_metric(lambda program: program.pages_in_use() == 0, 3.0)


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

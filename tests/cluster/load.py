"""A steady load of real clients against the gateway, and what became of every request. Each answer has to be right.

A client does what a gRPC client does by default or is told to by a service config: it waits for a connection, and
tries a call again that was refused with UNAVAILABLE before anything of an answer had come. Nothing else is forgiven.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from grpc import aio

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

REQUEST_SECONDS = 120.0
# Twelve seconds in all: a worker that is the only one of its kind is replaced in three to six.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.8s",
                "maxBackoff": "8s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection each, so that a Service spreads them
    ("grpc.service_config", json.dumps(_RETRIES)),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.initial_reconnect_backoff_ms", 100),
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of request: what is asked, and (once known) the only right answer."""

    prompt: str
    max_tokens: int
    seed: int | None = None  # None: greedy

    def request(self) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(temperature=0.0 if self.seed is None else 0.8, max_tokens=self.max_tokens)
        if self.seed is not None:
            sampling.seed = self.seed
        request = pb.GenerateRequest(text=self.prompt, sampling=sampling)
        request.stop.ignore_eos = True
        return request


@dataclass(slots=True)
class Report:
    """What became of the requests that ended so far."""

    answered: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    ttft_seconds: list[float] = field(default_factory=list)
    longest_gap_seconds: float = 0.0

    @property
    def failed(self) -> int:
        return sum(self.failures.values()) + len(self.wrong)

    def __str__(self) -> str:
        text = f"{self.answered} answered, {self.failed} failed, {self.tokens} tokens"
        if self.failures:
            text += f", {dict(self.failures)}"
        return text + "".join(f"\n  wrong: {wrong}" for wrong in self.wrong[:3])


async def answer(stub: Any, ask: Ask, report: Report | None = None) -> str:
    """Stream one answer and return its text; raises grpc.aio.AioRpcError."""
    began = last = time.monotonic()
    parts: list[str] = []
    call = stub.StreamGenerate(ask.request(), timeout=REQUEST_SECONDS, wait_for_ready=True)
    async for response in call:
        now = time.monotonic()
        if report is not None:
            if not parts:
                report.ttft_seconds.append(now - began)
            else:
                report.longest_gap_seconds = max(report.longest_gap_seconds, now - last)
        last = now
        parts.append(response.text)
    assert response.usage.completion_tokens == ask.max_tokens, f"{response.usage} tokens of {ask}"
    return "".join(parts)


class Load:
    """`num_clients` clients, each with a connection of its own and one request at a time, while it is entered."""

    def __init__(self, address: str, asks: Sequence[Ask], *, num_clients: int) -> None:
        self.report = Report()
        self._address = address
        self._asks = tuple(asks)
        self._num_clients = num_clients
        self._expected: dict[Ask, str] = {}
        self._loop = asyncio.new_event_loop()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")

    def expect(self, expected: dict[Ask, str]) -> Self:
        """Compare every answer with these."""
        self._expected = expected
        return self

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait(lambda report: report.answered >= self._num_clients)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the requests that run come to their end."""
        self._stopping.set()
        self._thread.join()

    def wait(self, condition: Callable[[Report], bool], seconds: float = 90.0) -> None:
        """Block until the report fulfils the condition; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition(self.report):
            assert time.monotonic() < deadline, f"the load made no progress: {self.report}"
            time.sleep(0.05)

    def wait_more(self, answers: int, seconds: float = 90.0) -> None:
        """Block until so many more requests have been answered."""
        goal = self.report.answered + answers
        self.wait(lambda report: report.answered >= goal, seconds)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._clients())
        self._loop.close()

    async def _clients(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(self._num_clients)))

    async def _client(self, number: int) -> None:
        async with aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            stub = InferenceServiceStub(channel)
            turn = number
            while not self._stopping.is_set():
                await self._ask(stub, self._asks[turn % len(self._asks)])
                turn += 1

    async def _ask(self, stub: InferenceServiceStub, ask: Ask) -> None:
        try:
            text = await answer(stub, ask, self.report)
        except aio.AioRpcError as error:
            self.report.failures[f"{error.code().name}: {error.details()}"] += 1
            await asyncio.sleep(0.2)  # a client that is refused does not hammer
            return
        expected = self._expected.get(ask)
        if expected is not None and text != expected:
            self.report.wrong.append(f"{ask.prompt!r} -> {text!r}, not {expected!r}")
        else:
            self.report.answered += 1
            self.report.tokens += ask.max_tokens


def answers_of(address: str, asks: Sequence[Ask]) -> dict[Ask, str]:
    """Return the answer to each, asked one after the other on one connection."""

    async def run() -> dict[Ask, str]:
        async with aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub = InferenceServiceStub(channel)
            return {ask: await answer(stub, ask) for ask in asks}

    return asyncio.run(run())


def ready_model(address: str, seconds: float = 30.0) -> pb.ModelInfo:
    """Return what the gateway says about its model and workers."""
    with grpc.insecure_channel(address, options=list(CHANNEL_OPTIONS)) as channel:
        stub = InferenceServiceStub(channel)
        return stub.ListModels(pb.ListModelsRequest(), timeout=seconds, wait_for_ready=True).models[0]

"""Streams that somebody does something to while they run: readers, and a pair of decode workers to be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.service import Program, Service

TCP = ("--transfer.transport", "tcp")
LONG = 800  # output tokens, seconds of the slow checkpoint, and figures are a tenth of a second late


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
        self._max_tokens = message.sampling.max_tokens
        self._call = stub.StreamGenerate(message, timeout=180)
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

    @property
    def is_under_way(self) -> bool:
        """Whether no output has ended; each is one of `max_tokens`, or has a stop string."""
        return self._thread.is_alive() and all(len(output) < self._max_tokens for output in list(self.output.values()))

    def wait(self, num_tokens: int) -> None:
        deadline = time.monotonic() + 30
        while self.num_tokens < num_tokens:
            assert time.monotonic() < deadline and self._thread.is_alive()
            time.sleep(0.002)

    def finish(self) -> Reader:
        self._thread.join(180)
        if self.error is not None:
            raise self.error
        return self


def start_gateway(service: Service, prefills: list[Program], decodes: list[Program], *flags: str) -> Program:
    return service.gateway(prefills, decodes, "--server.metrics-port", "0", *flags)


def resumed(gateway: Program, cause: str) -> float:
    return gateway.metrics().get(f'tandem_gateway_resumptions_total{{cause="{cause}"}}', 0.0)


def running(
    *workers: Program, total: int = 1, metric: str = "running_requests", of: Reader | None = None
) -> list[tuple[float, Program]]:
    """What each decodes, most first, once that is `total` or `of` has ended; figures are a tenth of a second late."""
    deadline = time.monotonic() + 20
    while True:
        found = [(worker.worker_metric(metric), worker) for worker in workers]
        if sum(number for number, _ in found) == total or (of is not None and not of.is_under_way):
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

    def strike(self, message: pb.GenerateRequest) -> tuple[Reader, float]:
        """Ask, and kill the worker that decodes most of it, in its middle; return what it had then.

        The ranks are stopped meanwhile: what was seen is still so when it is killed. What ended before is asked again.
        """
        ranks = [pid for worker in self.decodes for pid in worker.children("tandem.worker.rank_main")]
        for _ in range(3):
            running(*self.decodes, total=0)
            reader = Reader(self.stub, message)
            reader.wait(40 * message.sampling.n)
            moved, victim = running(*self.decodes, total=message.sampling.n, of=reader)[0]
            for pid in ranks:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)  # what had left the ranks arrives
            hit = reader.is_under_way
            if hit:
                victim.kill()
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            if hit:
                return reader, moved
            reader.finish()
        pytest.fail("each ended before it was looked at")

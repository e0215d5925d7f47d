"""A gateway on a real port before fake workers, and a client; `run` runs a scenario against them in uvloop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import uvloop
from grpc import aio

from tandem.config import Config, GatewayConfig, ModelConfig, ServerConfig
from tandem.errors import TandemError
from tandem.gateway.server import Gateway
from tandem.rpc import status
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1 import inference_service_pb2_grpc as pb_grpc
from tests.fakes.worker import FakeWorker
from tests.gateway.model import VOCAB_SIZE, model_folder


@dataclass(slots=True)
class Setup:
    """A running gateway with its workers; `stub` is a client's."""

    gateway: Gateway
    workers: list[FakeWorker]
    address: str
    channel: aio.Channel
    stub: Any

    @property
    def worker(self) -> FakeWorker:
        return self.workers[0]


@contextlib.asynccontextmanager
async def running(
    folder: Path, workers: Sequence[FakeWorker], *, ready: bool = True, metrics: bool = False, **gateway: Any
) -> AsyncIterator[Setup]:
    """Start workers and gateway, wait until it serves, and stop all of them in the end."""
    if not (folder / "tokenizer.json").exists():
        model_folder(folder)
    addresses = [await worker.start() for worker in workers]
    config = Config(
        model=ModelConfig(path=str(folder), served_name="m"),
        server=ServerConfig(metrics_port=0 if metrics else -1),
        gateway=replace(GatewayConfig(decode=tuple(addresses)), **gateway),
    )
    server = await Gateway.create(config)
    address = await server.start()
    # A window that does not grow: a client that does not read is noticed after 64 KiB.
    options = [
        ("grpc.max_send_message_length", 64 << 20),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65535),
    ]
    channel = aio.insecure_channel(address, options=options)
    try:
        if ready:
            await until(lambda: len([view for view in server.fleet.views() if view.ready]) == len(workers))
        yield Setup(server, list(workers), address, channel, pb_grpc.InferenceServiceStub(channel))
    finally:
        await channel.close()
        await server.stop(0)
        for worker in workers:
            await worker.kill()


def run(
    folder: Path,
    scenario: Callable[[Setup], Awaitable[None]],
    *workers: FakeWorker,
    **options: Any,
) -> None:
    """Run `scenario` against a gateway before `workers` (one decode worker if none are given)."""

    async def main() -> None:
        async with running(folder, workers or [byte_worker()], **options) as setup:
            await asyncio.wait_for(scenario(setup), 60)

    uvloop.run(main())


def byte_worker(role: str = "decode", **options: Any) -> FakeWorker:
    """A fake worker with the byte tokenizer's vocabulary."""
    return FakeWorker(role, vocab_size=VOCAB_SIZE, **options)


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition that another task makes true; long, as the machine may be busy with something else."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def text_request(text: str, *, max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    """A greedy request for `max_tokens` tokens."""
    sampling = fields.pop("sampling", None) or pb.SamplingParams()
    sampling.max_tokens = max_tokens
    return pb.GenerateRequest(text=text, sampling=sampling, **fields)


async def collect(call: Any) -> list[pb.StreamGenerateResponse]:
    """All messages of a stream."""
    return [message async for message in call]


async def failure(call: Any) -> tuple[grpc.StatusCode, TandemError]:
    """The status that a unary or streaming call ends with, and the error that its details name."""
    try:
        if hasattr(call, "__aiter__"):
            await collect(call)
        else:
            await call
    except aio.AioRpcError as error:
        return error.code(), status.from_rpc_error(error)
    raise AssertionError("the call did not fail")

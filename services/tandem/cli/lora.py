"""`tandem lora train|cancel|load`: adapters of a running worker, over its AdminService."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from tandem.cli.client import tls_of
from tandem.errors import ConfigError, TandemError, Unavailable
from tandem.rpc.admin_upload import wait_until_taken
from tandem.rpc.channels import open_channel, why_not_connected
from tandem.rpc.gen.admin.v1 import admin_service_pb2 as admin_pb2
from tandem.rpc.gen.admin.v1 import admin_service_pb2_grpc as admin_grpc
from tandem.rpc.options import WORKER_MESSAGE_BYTES
from tandem.rpc.status import from_rpc_error

CONNECT_SECONDS = 5.0
_MESSAGE_BYTES = 1 << 20  # of examples, roughly
_LINE_BYTES_MAX = 4 << 20
_BEGIN_ATTEMPTS = 3


def train(arguments: argparse.Namespace) -> int:
    """Train an adapter on a JSONL file; Ctrl-C cancels it on the worker."""
    begin = _begin(arguments)
    examples = list(read_examples(Path(arguments.file)))

    async def call(stub: Any) -> None:
        is_taken = False

        async def requests() -> AsyncIterator[admin_pb2.TrainLoraRequest]:
            nonlocal is_taken
            yield admin_pb2.TrainLoraRequest(begin=begin)
            is_taken = await wait_until_taken(stream)
            if is_taken:
                for message in _uploads(examples):
                    yield message

        for attempts_left in reversed(range(_BEGIN_ATTEMPTS)):
            stream = stub.TrainLora(requests())
            try:
                async for event in stream:
                    print(told(event), flush=True)
                return
            except aio.AioRpcError as error:
                # Of a call that had ended before Begin was written, grpc.aio says this; the next one says why.
                if is_taken or error.code() is not grpc.StatusCode.INTERNAL or not attempts_left:
                    raise

    return _run(arguments, call)


def cancel(arguments: argparse.Namespace) -> int:
    """End the training under way."""

    async def call(stub: Any) -> None:
        answer = await stub.CancelTraining(admin_pb2.CancelTrainingRequest(adapter=arguments.name))
        print("cancelled" if answer.cancelled else "no such training is under way")

    return _run(arguments, call)


def load(arguments: argparse.Namespace) -> int:
    """Serve an adapter of the worker's own folder."""

    async def call(stub: Any) -> None:
        answer = await stub.LoadAdapter(admin_pb2.LoadAdapterRequest(adapter=arguments.name))
        print(f"adapter {arguments.name} is served, digest {answer.digest}")

    return _run(arguments, call)


def told(event: admin_pb2.TrainLoraResponse) -> str:
    """Return a line about one event of a training."""
    match event.WhichOneof("event"):
        case "started":
            started = event.started
            return f"{started.examples} examples, {started.tokens} tokens an epoch, {started.steps} steps"
        case "step":
            step = event.step
            return (
                f"step {step.step}/{step.steps}  loss {step.loss:.4f}  {step.tokens_per_second:.0f} tokens/s  "
                f"{step.device_share:.0%} of the device"
            )
        case _:
            return f"adapter {event.finished.adapter} is saved and served, digest {event.finished.digest}"


def read_examples(path: Path) -> Iterator[admin_pb2.Example]:
    """Read {"text": ...} or {"prompt": ..., "completion": ...} a line; raises ConfigError with the line at fault."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _example(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _example(line: bytes, where: str) -> admin_pb2.Example:
    if len(line) > _LINE_BYTES_MAX:
        raise ConfigError(f"{where}: more than {_LINE_BYTES_MAX} bytes")
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON: {error}") from error
    if isinstance(values, dict) and values.keys() == {"text"}:
        values = {"prompt": "", "completion": values["text"]}
    if not isinstance(values, dict) or values.keys() != {"prompt", "completion"}:
        raise ConfigError(f'{where}: must be {{"text": ...}} or {{"prompt": ..., "completion": ...}}')
    if not all(isinstance(value, str) for value in values.values()) or not values["completion"]:
        raise ConfigError(f"{where}: text, prompt and completion are strings, and text and completion are not empty")
    return admin_pb2.Example(**values)


def _uploads(examples: list[admin_pb2.Example]) -> Iterator[admin_pb2.TrainLoraRequest]:
    batch, size = admin_pb2.Examples(), 0
    for example in examples:
        batch.examples.append(example)
        size += example.ByteSize()
        if size >= _MESSAGE_BYTES:
            yield admin_pb2.TrainLoraRequest(examples=batch)
            batch, size = admin_pb2.Examples(), 0
    if batch.examples:
        yield admin_pb2.TrainLoraRequest(examples=batch)


def _begin(arguments: argparse.Namespace) -> admin_pb2.Begin:
    return admin_pb2.Begin(
        adapter=arguments.name,
        rank=arguments.rank,
        alpha=arguments.alpha,
        rslora=arguments.rslora,
        targets=[name.strip() for name in arguments.targets.split(",") if name.strip()],
        learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        max_sequence_tokens=arguments.max_sequence_tokens,
        seed=arguments.seed,
    )


def _run(arguments: argparse.Namespace, call: Callable[[Any], Awaitable[None]]) -> int:
    try:
        asyncio.run(_with_stub(arguments, call))
    except TandemError as error:
        if isinstance(error, ConfigError):
            raise
        print(f"tandem lora: {error.message}", file=sys.stderr)
        return 1
    return 0


async def _with_stub(arguments: argparse.Namespace, call: Callable[[Any], Awaitable[None]]) -> None:
    tls, address = tls_of(arguments), arguments.worker
    async with open_channel(address, max_message_bytes=WORKER_MESSAGE_BYTES, tls=tls) as channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        except TimeoutError:
            reason = await why_not_connected(channel, secure=tls is not None)
            raise Unavailable(f"no worker answers at {address}{f' ({reason})' if reason else ''}") from None
        try:
            await call(admin_grpc.AdminServiceStub(channel))
        except aio.AioRpcError as error:
            if error.code().name == "UNIMPLEMENTED":
                raise Unavailable(f"{address} has no AdminService: start the worker with --server.admin on") from error
            raise from_rpc_error(error) from error

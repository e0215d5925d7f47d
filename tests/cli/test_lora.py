"""What `tandem lora train` says of a worker that refuses or fails, whenever that comes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from tandem.cli.main import main
from tandem.rpc.admin_upload import BEGIN_TAKEN
from tandem.rpc.gen.admin.v1 import admin_service_pb2 as admin_pb2
from tandem.rpc.gen.admin.v1 import admin_service_pb2_grpc as admin_grpc


@pytest.fixture
def address() -> Iterator[str]:
    """Where somebody listens."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


class Call:
    """A training's call that ends with `code`, after Begin and all examples if it is taken."""

    def __init__(self, requests: AsyncIterator[Any], code: grpc.StatusCode, *, taken: bool) -> None:
        self._requests = requests
        self._code = code
        self._taken = taken
        self.num_requests = 0

    async def initial_metadata(self) -> aio.Metadata:
        return aio.Metadata(*BEGIN_TAKEN)

    async def __aiter__(self) -> AsyncIterator[Any]:
        if self._taken:
            async for _ in self._requests:
                self.num_requests += 1
            yield admin_pb2.TrainLoraResponse(step=admin_pb2.Step(step=1, steps=9))
        raise aio.AioRpcError(self._code, aio.Metadata(), aio.Metadata(), "details")


# Of a call whose end the core knows when Begin is written, and nobody else yet, grpc.aio says INTERNAL.
LATE = (grpc.StatusCode.INTERNAL, False)
BARE = (grpc.StatusCode.UNIMPLEMENTED, False)
FAILED = (grpc.StatusCode.INTERNAL, True)


@pytest.mark.parametrize(
    ("script", "num_calls", "expected"),
    [
        ([BARE], 1, "start the worker with --server.admin on"),
        ([LATE, LATE, BARE], 3, "start the worker with --server.admin on"),
        ([LATE] * 9, 3, "details"),
        ([FAILED, BARE], 1, "details"),
        ([LATE, FAILED, BARE], 2, "details"),
    ],
)
def test_a_training_that_ends_says_why_and_is_done_once(
    address: str,
    tmp_path: Path,
    script: list[tuple[grpc.StatusCode, bool]],
    num_calls: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[Call] = []

    class Stub:
        def __init__(self, channel: aio.Channel) -> None:
            """Nothing goes over the channel."""

        def TrainLora(self, requests: AsyncIterator[Any]) -> Call:
            code, taken = script[len(calls)]
            calls.append(Call(requests, code, taken=taken))
            return calls[-1]

    monkeypatch.setattr(admin_grpc, "AdminServiceStub", Stub)
    file = tmp_path / "examples.jsonl"
    file.write_text(json.dumps({"text": "x"}))
    assert main(["lora", "train", str(file), "--worker", address, "--name", "a"]) == 1
    said = capsys.readouterr()
    assert expected in said.err
    uploads = sum(taken for _, taken in script[:num_calls])
    assert said.out.count("step 1/9") == uploads
    assert [call.num_requests for call in calls] == [2 if taken else 0 for _, taken in script[:num_calls]]

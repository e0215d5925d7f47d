"""What `tandem lora` says of a worker that refuses, whenever the refusal comes."""

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
from tandem.rpc.gen.admin.v1 import admin_service_pb2_grpc as admin_grpc

REAL_STUB = admin_grpc.AdminServiceStub


@pytest.fixture
def bare() -> Iterator[str]:
    """The address of a server without an AdminService."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


async def ended_before_begin() -> AsyncIterator[Any]:
    """What grpc.aio makes of a call whose end the core knows when Begin is written, and nobody else yet."""
    raise aio.AioRpcError(grpc.StatusCode.INTERNAL, aio.Metadata(), aio.Metadata(), "Internal error from Core")
    yield


@pytest.mark.parametrize(
    ("num_late", "expected"), [(0, "start the worker with --server.admin on"), (2, "--server.admin on"), (9, "Core")]
)
def test_a_refused_training_says_why(
    bare: str,
    tmp_path: Path,
    num_late: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    num_calls = 0

    class Stub:
        def __init__(self, channel: aio.Channel) -> None:
            self._real: Any = REAL_STUB(channel)

        def TrainLora(self, requests: AsyncIterator[Any]) -> Any:
            nonlocal num_calls
            num_calls += 1
            return ended_before_begin() if num_calls <= num_late else self._real.TrainLora(requests)

    monkeypatch.setattr(admin_grpc, "AdminServiceStub", Stub)
    file = tmp_path / "examples.jsonl"
    file.write_text(json.dumps({"text": "x"}))
    assert main(["lora", "train", str(file), "--worker", bare, "--name", "a"]) == 1
    assert expected in capsys.readouterr().err
    assert num_calls == min(num_late + 1, 3)

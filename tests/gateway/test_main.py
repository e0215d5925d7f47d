"""The gateway as a program: no torch, a drain on SIGTERM, its metrics and its log."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
import uvloop
from grpc import aio

from tandem.config import Config, GatewayConfig, ModelConfig, ServerConfig
from tandem.errors import ConfigError
from tandem.gateway.main import serve
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1 import inference_service_pb2_grpc as pb_grpc
from tests.fakes.worker import scripted
from tests.gateway.harness import Setup, byte_worker, collect, failure, run, text_request, until
from tests.gateway.model import ids_of, model_folder


def test_no_torch_in_the_gateway() -> None:
    code = (
        "import sys, tandem.gateway.main; "
        "print([m for m in ('torch', 'transformers', 'mooncake', 'numpy', 'tandem.engine', 'tandem.worker') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def config_of(folder: Path, *workers: str, drain_seconds: float = 10.0, host: str = "127.0.0.1") -> Config:
    return Config(
        model=ModelConfig(path=str(folder), served_name="m"),
        server=ServerConfig(drain_seconds=drain_seconds, metrics_port=0, host=host),
        gateway=GatewayConfig(decode=workers),
    )


@pytest.mark.parametrize(("drain_seconds", "signals", "finishes"), [(60.0, 1, True), (0.1, 1, False), (60.0, 2, False)])
def test_a_signal_drains(tmp_path: Path, drain_seconds: float, signals: int, finishes: bool) -> None:
    async def scenario() -> None:
        worker = byte_worker(token=scripted(ids_of("x")), step_seconds=0.005, stall_after=None if finishes else 5)
        address = await worker.start()
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = config_of(model_folder(tmp_path), address, drain_seconds=drain_seconds)
        program = asyncio.create_task(serve(config, lambda address, port: ready.set_result(address)))
        channel = aio.insecure_channel(await ready)
        stub = pb_grpc.InferenceServiceStub(channel)
        async with asyncio.timeout(30):
            while (await stub.ListModels(pb.ListModelsRequest())).models[0].ready_decode_workers == 0:
                await asyncio.sleep(0.01)
        call = stub.StreamGenerate(text_request("ab", max_tokens=100))
        await until(lambda: worker.inflight == 1)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
        if finishes:
            code, _ = await failure(stub.Generate(text_request("ab")))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert len("".join(message.text for message in await collect(call))) == 100
        else:
            await asyncio.wait_for(failure(call), 30)
            await worker.aborted()  # it reaches the worker although the gateway is on its way out
        assert await asyncio.wait_for(program, 30) == 0
        await until(lambda: not worker.sessions)
        await channel.close()
        await worker.kill()

    uvloop.run(scenario())


def test_a_configuration_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        uvloop.run(serve(config_of(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="cannot listen"):
        uvloop.run(serve(config_of(model_folder(tmp_path), host="203.0.113.1")))
    model_folder(tmp_path, top_p=7.0)
    with pytest.raises(ConfigError, match="top_p"):
        uvloop.run(serve(config_of(tmp_path)))


def test_metrics_are_exported_and_the_log_has_one_line_a_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario(setup: Setup) -> None:
        await collect(setup.stub.StreamGenerate(text_request("very secret", max_tokens=5, request_id="r1")))
        await failure(setup.stub.Generate(text_request("", request_id="r2")))
        url = f"http://127.0.0.1:{setup.gateway.metrics_port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
        for line in (
            'tandem_gateway_requests_total{api="StreamGenerate",code="OK"} 1.0',
            'tandem_gateway_requests_total{api="Generate",code="INVALID_ARGUMENT"} 1.0',
            'tandem_gateway_ttft_seconds_count{api="StreamGenerate"} 1.0',
            'tandem_gateway_tpot_seconds_count{api="StreamGenerate"} 1.0',
            'tandem_gateway_tokens_total{kind="prompt"} 11.0',
            'tandem_gateway_tokens_total{kind="output"} 5.0',
            'tandem_gateway_ready_workers{role="decode"} 1.0',
            "tandem_gateway_inflight 0.0",
        ):
            assert line in text

    run(tmp_path, scenario, byte_worker(token=scripted(ids_of("x"))), metrics=True)
    fields = [getattr(record, "fields", {}) for record in caplog.records if record.message == "request ended"]
    assert [(line["request_id"], line["code"], line["completion_tokens"]) for line in fields] == [
        ("r1", "OK", 5),
        ("r2", "INVALID_ARGUMENT", 0),
    ]
    assert "secret" not in json.dumps(fields) + caplog.text

"""Whole workers, as an operator starts them, with the built-in model: how they start, say that they serve, and end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem.core.messages.requests import Submit
from tandem.core.messages.sampling import SamplingParams
from tandem.core.token_ids import pack
from tandem.rpc.convert import submit_to_proto
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.e2e.service import Program, wait_serving

SOON = 12.0  # two seconds, and more for a machine that runs other tests; what waits for a drain takes 30
SMALL = ("--cache.pool-bytes", str(8 << 20), "--model.threads", "1")


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        if program.process.poll() is None:
            program.kill()


def start(programs: list[Program], folder: Path, role: str, *flags: str) -> Program:
    program = Program(role, folder, *SMALL, *flags)
    programs.append(program)
    return program.wait_ready()


def gone_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ends(*words: str) -> tuple[int, str]:
    """Run a program that must not come to serve; return its exit code and what it wrote on stderr."""
    result = subprocess.run(
        [sys.executable, "-m", "tandem.cli.main", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == ""
    return result.returncode, result.stderr


def test_a_unified_worker_from_start_to_end(programs: list[Program], tmp_path: Path) -> None:
    worker = start(programs, tmp_path, "unified", "--server.metrics-port", "0", "--cache.huge-pages", "off")
    assert any(
        series.startswith("tandem_worker_info{") and 'pool_pages="ordinary"' in series for series in worker.metrics()
    )
    assert worker.ready["loop"] == "overlap" and worker.ready["program"] == "unified"
    assert worker.ready["max_total_num_tokens"] == worker.ready["num_pages"] * worker.ready["page_tokens"]
    assert worker.ready["max_req_input_len"] == 2047
    assert not worker.children("transfer")
    wait_serving(worker.address)
    with grpc.insecure_channel(worker.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "tandem.worker.v1.WorkerService", "liveness", "readiness"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in next(listing).list_services_response.service}
        assert {"tandem.worker.v1.WorkerService", "grpc.health.v1.Health"} <= names
        submit = Submit(
            request_id=0,
            prompt_token_ids=pack([5, 6, 7]),
            sampling=SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True),
        )
        call = WorkerServiceStub(channel).Generate(worker_pb2.GenerateRequest(submit=submit_to_proto(submit)))
        answers = list(call)
        assert sum(len(answer.delta.token_ids) for answer in answers) == 5
        assert answers[-1].end.usage.completion_tokens == 5
    worker.wait_metric(lambda program: program.worker_metric("generated_tokens") == 5)
    children = psutil.Process(worker.process.pid).children(recursive=True)
    assert worker.process.stdout is not None
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.stdout.read() == "", "there is one line on stdout, no more"
    assert worker.stop() == 0
    assert gone_within([child.pid for child in children], SOON)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_dead_rank_takes_its_worker_down_with_the_reason(programs: list[Program], tmp_path: Path, role: str) -> None:
    worker = start(programs, tmp_path, role)
    (rank,) = worker.children("tandem.worker.rank_main")
    transfer = worker.children("tandem.transfer.main")
    assert len(transfer) == 1
    psutil.Process(rank).send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert worker.process.wait(25.0) == 1
    assert time.monotonic() - began < SOON
    assert "rank 0 ended by signal 9" in worker.log()
    assert gone_within([rank, *transfer], SOON)


def test_a_dead_frontend_takes_rank_and_transfer_process_along(programs: list[Program], tmp_path: Path) -> None:
    worker = start(programs, tmp_path, "decode")
    children = [child.pid for child in psutil.Process(worker.process.pid).children(recursive=True)]
    assert len(children) == 2
    worker.kill()
    assert gone_within(children, SOON)


def test_a_killed_transfer_process_comes_back(programs: list[Program], tmp_path: Path) -> None:
    worker = start(programs, tmp_path, "prefill")
    (first,) = worker.children("tandem.transfer.main")
    psutil.Process(first).send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while not (lives := [pid for pid in worker.children("tandem.transfer.main") if pid != first]):
        assert time.monotonic() < deadline, worker.log()
        time.sleep(0.02)
    assert len(lives) == 1
    assert worker.stop() == 0
    assert f"transfer process {first} is gone" in worker.log(), "what the rank logs is in the worker's log"


def test_a_stop_in_the_middle_of_the_start_is_a_stop(tmp_path: Path) -> None:
    worker = Program("prefill", tmp_path, *SMALL)
    deadline = time.monotonic() + 20.0
    while "loading" not in worker.log():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert worker.stop(10.0) == 0


def test_two_signals_hand_everything_back_at_once(programs: list[Program], tmp_path: Path) -> None:
    worker = start(programs, tmp_path, "unified", "--model.ops", "reference")  # slow: it must not end by itself
    with grpc.insecure_channel(worker.address) as channel:
        sampling = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)
        submit = Submit(request_id=0, prompt_token_ids=pack([5]), sampling=sampling)
        call = WorkerServiceStub(channel).Generate(worker_pb2.GenerateRequest(submit=submit_to_proto(submit)))
        next(call)
        worker.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert worker.process.poll() is None, "a request is running: the first signal waits for it"
        worker.process.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert worker.process.wait(SOON) == 0


def test_what_cannot_be_served_is_a_configuration_error(tmp_path: Path) -> None:
    code, error = ends("prefill", *SMALL, "--model", str(tmp_path / "nothing"))
    assert code == 2 and "nothing" in error
    code, error = ends("prefill", *SMALL, "--transport", "mooncake-rdma")
    assert code == 2 and "trusted_network" in error
    code, error = ends("unified", "--cache.pool-bytes", str(1 << 40), "--cache.huge-pages", "require")
    assert code == 2 and "cache.huge_pages: the KV pool needs 524288 huge pages of 2 MB" in error
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, error = ends("unified", *SMALL, "--port", str(taken.getsockname()[1]))
        assert code == 2 and "cannot listen" in error


def test_the_ready_line_is_json_with_the_limits(programs: list[Program], tmp_path: Path) -> None:
    worker = start(programs, tmp_path, "decode", "--loop", "normal", "--transport", "tcp")
    assert json.loads(json.dumps(worker.ready)) == worker.ready
    assert worker.ready["loop"] == "normal_decode"
    assert worker.ready["transports"] == ["tcp"]
    assert worker.ready["num_pages"] == (8 << 20) // worker.ready["page_bytes"]
    assert len(bytes.fromhex(worker.ready["instance_id"])) == 16

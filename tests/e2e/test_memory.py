"""A model is in memory once: while it is loaded, and afterwards; and what a step frees is what the next one takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tandem.cli.bench_shapes import SHAPES
from tandem.core.token_ids import pack
from tandem.engine.bench_model import MakeModelRequest, make_model
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.e2e.service import Program

POOL_BYTES = 100 << 20
BUDGET_TOKENS = 512
NUM_REQUESTS, NUM_WINDOWS, WINDOW_STEPS = 16, 4, 3
SLACK_BYTES = 500 << 20  # Python, torch and what they load
START_CPU_SECONDS = 10.0
# Fresh temporaries for the logits of 16 rows alone would be 2370, in every window. In some of them the heap grows by a
# piece that it keeps, or pages of the pool are used for the first time.
FAULTS_PER_STEP = 200


@dataclass(frozen=True)
class Worker:
    program: Program
    rank: psutil.Process
    weight_bytes: int
    start_cpu_seconds: float

    @property
    def limit_bytes(self) -> float:
        return 1.15 * (self.weight_bytes + POOL_BYTES) + SLACK_BYTES


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker over a model of 0.5 billion parameters, just ready."""
    folder = tmp_path_factory.mktemp("memory")
    make_model(MakeModelRequest(config=SHAPES["qwen2.5-0.5b"], folder=str(folder / "model")), lambda text: None)
    weight_bytes = (folder / "model" / "model.safetensors").stat().st_size
    flags = ("--cache.pool-bytes", str(POOL_BYTES), "--scheduler.budget-tokens", str(BUDGET_TOKENS))
    no_time_bound = ("--scheduler.step-seconds-max", "0", "--server.metrics-port", "0")
    program = Program("unified", folder, "--model.path", str(folder / "model"), *flags, *no_time_bound)
    try:
        program.wait_ready()
        everybody = [program.process.pid, *program.children("tandem")]
        spent = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in everybody)
        (rank,) = program.children("rank_main")
        yield Worker(program, psutil.Process(rank), weight_bytes, spent)
        assert program.stop() == 0
    finally:
        if program.process.poll() is None:
            program.kill()


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024


def num_faults(pid: int) -> int:
    """Page faults of a process so far that needed no reading from a disk."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


@pytest.mark.slow
def test_start(worker: Worker) -> None:
    """Its processor time bounds the start on an idle machine; the time on the wall is the neighbours' affair."""
    peak = peak_bytes(worker.rank.pid)
    print(f"ready after {worker.start_cpu_seconds:.1f} s of CPUs, peak {peak / 1e9:.2f} GB")
    assert worker.start_cpu_seconds <= START_CPU_SECONDS
    assert peak <= worker.limit_bytes


@pytest.mark.slow
def test_steady_state(worker: Worker) -> None:
    """After a prompt that fills a plan and batches of every kind of sampling."""
    with grpc.insecure_channel(worker.program.address) as channel:
        assert list(generate(channel, 0, BUDGET_TOKENS, pb.SamplingParams(temperature=0.0), max_tokens=2))
        faults = faults_of_windows(worker, channel)
    peak = peak_bytes(worker.rank.pid)
    print(f"faults a step {[round(each) for each in faults]}, peak {peak / 1e9:.2f} GB")
    assert min(faults) <= FAULTS_PER_STEP
    assert peak <= worker.limit_bytes


def faults_of_windows(worker: Worker, channel: grpc.Channel) -> list[float]:
    """Decode requests of every kind together; return the page faults a step of some windows of steps."""
    kinds = (
        pb.SamplingParams(temperature=0.0),
        pb.SamplingParams(temperature=0.9, seed=1),
        pb.SamplingParams(temperature=0.9, seed=1, top_k=40),
        pb.SamplingParams(temperature=0.9, seed=1, min_p=0.1, repetition_penalty=1.1),
    )
    calls = [
        generate(channel, 1 + number, 8, kinds[number % len(kinds)], max_tokens=200) for number in range(NUM_REQUESTS)
    ]
    program, rank, found = worker.program, worker.rank.pid, []
    program.wait_metric(lambda program: program.worker_metric("running_requests") == NUM_REQUESTS, 60)
    for _ in range(NUM_WINDOWS):
        began, before = program.worker_metric("steps"), num_faults(rank)
        wait_steps(program, began + WINDOW_STEPS)
        found.append((num_faults(rank) - before) / (program.worker_metric("steps") - began))
    assert program.worker_metric("running_requests") == NUM_REQUESTS
    for call in calls:
        call.cancel()
    program.wait_metric(lambda program: program.worker_metric("running_requests") == 0)
    return found


def wait_steps(program: Program, least: float) -> None:
    program.wait_metric(lambda program: program.worker_metric("steps") >= least, 60)


def generate(
    channel: grpc.Channel, number: int, num_tokens: int, sampling: pb.SamplingParams, *, max_tokens: int
) -> Any:
    """Begin a request; its messages are the call's."""
    sampling = pb.SamplingParams.FromString(sampling.SerializeToString())
    sampling.max_tokens = max_tokens
    submit = worker_pb.Submit(
        rid=1,
        request_id=f"memory-{number}",
        prompt_token_ids=pack([(number * 31 + position) % 50_000 for position in range(num_tokens)]),
        sampling=sampling,
        stop=pb.StopConditions(ignore_eos=True),
        output=pb.OutputOptions(logprobs=3),
    )
    return WorkerServiceStub(channel).Generate(worker_pb.GenerateRequest(submit=submit), timeout=240)


def test_the_eyes_of_these_tests() -> None:
    """Memory that is touched shows in the peak and as faults; in a new process, since this one may have been larger."""
    touch = "input(); block = bytearray(b'1') * (300 << 20); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", touch], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        peak, faults = peak_bytes(child.pid), num_faults(child.pid)
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
        assert peak_bytes(child.pid) - peak > 100 << 20
        assert num_faults(child.pid) - faults > 100  # huge pages, if there are any, are few
        child.stdin.write(b"\n")

"""Workers of several ranks as an operator starts them: what they hold, and every way for one of them to go."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tandem.core.messages.requests import Submit
from tandem.core.messages.sampling import SamplingParams
from tandem.core.token_ids import pack
from tandem.rpc.convert import submit_to_proto
from tandem.rpc.gen.worker.v1 import worker_service_pb2 as worker_pb2
from tandem.rpc.gen.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tests.e2e.service import Program
from tests.worker.test_worker_process import SMALL, SOON, gone_within, start

TENSOR = ("--parallel.tensor-size", "2")
STAGES = ("--parallel.pipeline-size", "2")
FOLLOWER = "tandem.worker.follower_main"


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        if program.process.poll() is None:
            for pid in program.children(FOLLOWER):
                psutil.Process(pid).resume()
            program.kill()


def generate(worker: Program, max_tokens: int) -> None:
    """Ask for tokens until they have come, or the worker is gone."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    submit = Submit(request_id=0, prompt_token_ids=pack([5, 6, 7]), sampling=sampling)
    with grpc.insecure_channel(worker.address) as channel:
        try:
            for _ in WorkerServiceStub(channel).Generate(worker_pb2.GenerateRequest(submit=submit_to_proto(submit))):
                pass
        except grpc.RpcError:
            return


def cpu_seconds(pids: list[int]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


@pytest.mark.parametrize("sizes", [TENSOR, STAGES])
def test_a_dead_follower_takes_its_worker_down_with_the_reason(
    programs: list[Program], tmp_path: Path, sizes: tuple[str, ...]
) -> None:
    worker = start(programs, tmp_path, "decode", *sizes)
    (follower,) = worker.children(FOLLOWER)
    ranks = [*worker.children("tandem.worker.rank_main"), follower]
    transfers = worker.children("tandem.transfer.main")
    assert len(transfers) == 2, "each rank has a transfer process of its own"
    before = cpu_seconds(ranks)
    time.sleep(1.0)
    assert cpu_seconds(ranks) - before < 0.2, "ranks without work block"
    psutil.Process(follower).send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert worker.process.wait(25.0) == 1
    assert time.monotonic() - began < SOON
    assert "rank 1 ended by signal 9" in worker.log()
    assert gone_within([*ranks, *transfers], SOON)


@pytest.mark.parametrize("sizes", [TENSOR, STAGES])
def test_a_stuck_follower_ends_by_time_out(programs: list[Program], tmp_path: Path, sizes: tuple[str, ...]) -> None:
    worker = start(programs, tmp_path, "unified", *sizes, "--parallel.collective-seconds", "5")
    generate(worker, 4)
    (follower,) = worker.children(FOLLOWER)
    ranks = [*worker.children("tandem.worker.rank_main"), follower]
    psutil.Process(follower).suspend()
    asking = threading.Thread(target=generate, args=(worker, 500))
    asking.start()
    began = time.monotonic()
    assert worker.process.wait(45.0) == 1
    assert time.monotonic() - began < 30, "a minute, if nobody says otherwise"
    asking.join()
    assert "rank 1 has said nothing for" in worker.log()
    assert gone_within(ranks, SOON)


def test_a_kill_in_the_middle_of_work(programs: list[Program], tmp_path: Path) -> None:
    worker = start(programs, tmp_path, "unified", *TENSOR, *STAGES, "--server.metrics-port", "0")
    followers = worker.children(FOLLOWER)
    assert len(followers) == 3
    ranks = [*worker.children("tandem.worker.rank_main"), *followers]
    listening = [one for pid in ranks for one in psutil.Process(pid).net_connections() if one.status == "LISTEN"]
    assert {one.laddr.ip for one in listening} == {"127.0.0.1"}, "ranks of one host meet where nobody else comes"
    asking = threading.Thread(target=generate, args=(worker, 2000))
    asking.start()
    worker.wait_metric(lambda program: program.worker_metric("generated_tokens") > 3)
    psutil.Process(followers[1]).send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert worker.process.wait(25.0) == 1
    assert time.monotonic() - began < SOON
    asking.join()
    assert "rank 2 ended by signal 9" in worker.log(), "the first cause, not what followed from it"
    assert gone_within(followers, SOON)


def test_a_dead_frontend_and_a_stop_take_all_ranks_along(programs: list[Program], tmp_path: Path) -> None:
    worker = start(programs, tmp_path, "decode", *STAGES)
    children = [child.pid for child in psutil.Process(worker.process.pid).children(recursive=True)]
    assert len(children) == 4
    worker.kill()
    assert gone_within(children, SOON)
    worker = start(programs, tmp_path, "unified", *STAGES)
    children = [child.pid for child in psutil.Process(worker.process.pid).children(recursive=True)]
    assert worker.stop() == 0
    assert gone_within(children, SOON)


def test_a_rank_that_cannot_start_says_why(tmp_path: Path) -> None:
    worker = Program("unified", tmp_path, *SMALL, *TENSOR, "--parallel.devices", "cpu,cuda:9")
    assert worker.process.wait(60.0) == 2
    assert "rank 1 is to run on cuda:9" in worker.log()

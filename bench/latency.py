"""Do the compute threads starve everybody else? Latencies of a real service, idle and while a worker computes.

A prefill and a decode worker, each with as many compute threads as there are CPUs, and a gateway. While `--streams`
long answers are decoded, as fast as the device can, the same things are measured as before on the idle service: a
call that the gateway answers itself, one that the decode worker's frontend answers, and the hand-off of a small
prompt, from the first read of its pages to the last verified one. Prints milliseconds and the steps' own length:

    tandem bench make-model --shape qwen2.5-0.5b --out DIR && python bench/latency.py --model DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.demo import model_path
from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

PING_SECONDS = 0.01  # between two
PROMPT_TOKENS = 16  # a page, so that all of it is computed in one plan
POOL_BYTES = 512 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--pings", type=int, default=400)
    parser.add_argument("--handoffs", type=int, default=10)
    given = parser.parse_args()
    folder = Path(given.model)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a made model has none; ids are all that is used here
        if not (folder / name).exists():
            shutil.copy(model_path() / name, folder / name)
    with ExitStack() as stack:
        flags = ("--model.path", str(folder))
        pool = ("--cache.pool-bytes", str(POOL_BYTES))
        workers = [stack.enter_context(program(role, *flags, *pool)) for role in ("prefill", "decode")]
        prefill, decode = (worker() for worker in workers)
        peers = ("--gateway.prefill", prefill["address"], "--gateway.decode", decode["address"])
        gateway = stack.enter_context(program("gateway", *flags, *peers))()
        channels = [stack.enter_context(grpc.insecure_channel(one["address"])) for one in (gateway, decode)]
        stub = InferenceServiceStub(channels[0])
        health: Any = health_pb2_grpc.HealthStub(channels[1])
        while stub.ListModels(pb.ListModelsRequest()).models[0].ready_prefill_workers == 0:
            time.sleep(0.1)
        handoff(stub, 0)
        calls: dict[str, tuple[Callable[[int], float], int]] = {
            "gateway call": (timed(lambda: stub.ListModels(pb.ListModelsRequest())), given.pings),
            "worker frontend call": (timed(lambda: health.Check(health_pb2.HealthCheckRequest())), given.pings),
            f"hand-off of {PROMPT_TOKENS} tokens": (lambda number: handoff(stub, number), given.handoffs),
        }
        idle = {name: measure(call, count) for name, (call, count) in calls.items()}
        with streams(stub, given.streams) as intervals:
            busy = {name: measure(call, count, 1000) for name, (call, count) in calls.items()}
    print(f"{'milliseconds':<24}{'idle p50':>10}{'idle p99':>10}{'busy p50':>10}{'busy p99':>10}")
    for name in calls:
        print(f"{name:<24}" + "".join(f"{value:>10.2f}" for value in (*quantiles(idle[name]), *quantiles(busy[name]))))
    middle, late = quantiles(intervals)
    print(f"{given.streams} streams meanwhile: a token every {middle:.1f} ms, p99 {late:.1f} ms")
    return 0


@contextmanager
def program(name: str, *flags: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Start one of Tandem's programs; what is given waits for its ready line and returns it."""
    command = [sys.executable, "-m", "tandem.cli.main", name, "--server.metrics-port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None

    def ready() -> dict[str, Any]:
        for line in process.stdout or ():
            message: dict[str, Any] = json.loads(line)
            if message.get("event") == "ready":
                return message
        raise SystemExit(f"{name} did not start")

    try:
        yield ready
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def timed(call: Callable[[], object]) -> Callable[[int], float]:
    def run(_: int) -> float:
        time.sleep(PING_SECONDS)
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return run


def handoff(stub: InferenceServiceStub, number: int) -> float:
    """Seconds of the transfer of a prompt that nobody has seen."""
    response = stub.Generate(request(number, PROMPT_TOKENS, 2), timeout=120)
    assert response.timing.kv_bytes > 0
    return float(response.timing.kv_transfer.ToTimedelta().total_seconds())


def request(number: int, prompt_tokens: int, max_tokens: int) -> pb.GenerateRequest:
    ids = [(number * 7919 + position * 31) % 4000 for position in range(prompt_tokens)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens),
        stop=pb.StopConditions(ignore_eos=True),
        output=pb.OutputOptions(return_token_ids=True, no_text=True, return_timing=True),
    )


def measure(call: Callable[[int], float], count: int, first: int = 1) -> list[float]:
    return [call(first + number) for number in range(count)]


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds."""
    ordered = sorted(seconds)
    return statistics.median(ordered) * 1e3, ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3


@contextmanager
def streams(stub: InferenceServiceStub, count: int) -> Iterator[list[float]]:
    """Keep decoding that many answers; gives the times between their tokens."""
    intervals: list[float] = []
    calls = [stub.StreamGenerate(request(-1 - number, 32, 1200), timeout=600) for number in range(count)]
    decoding = threading.Barrier(count + 1)

    def read(call: Any) -> None:
        last = 0.0
        try:
            for number, message in enumerate(call):
                now = time.perf_counter()
                if number == 2:
                    decoding.wait()
                if number > 2 and message.token_ids:
                    intervals.append(now - last)
                last = now
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise

    readers = [threading.Thread(target=read, args=(call,)) for call in calls]
    for reader in readers:
        reader.start()
    decoding.wait()
    yield intervals
    for call in calls:
        call.cancel()
    for reader in readers:
        reader.join()


if __name__ == "__main__":
    sys.exit(main())

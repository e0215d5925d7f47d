"""Real programs for end-to-end tests: each a process of its own, as an operator would start it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tandem.rpc.gen.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

START_SECONDS = 120.0
# A peer of a machine that stands still for some seconds is not lost.
PATIENCE = ("--handoff.connect-seconds", "30", "--handoff.progress-seconds", "30")
FREE_SECONDS = 8.0  # until pages are free again, at most: less than a lease, which would free them as well
_SAMPLE = re.compile(r"^(\w+)(\{[^}]*\})? ([-+.eE0-9naif]+)$", re.MULTILINE)


class Program:
    """One of `tandem gateway|prefill|decode|unified`. `ready` is its ready line."""

    def __init__(self, name: str, folder: Path, *flags: str) -> None:
        self.name = name
        self.log_path = folder / f"{name}-{time.monotonic_ns()}.log"
        self._log = self.log_path.open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli.main", name, *flags],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> Program:
        """Block until the ready line; fails with the log if the program ends before."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            line = self.process.stdout.readline()
            if not line:
                break
            message = json.loads(line)
            if message.get("event") == "ready":
                self.ready = message
                return self
        self.process.kill()
        raise AssertionError(f"{self.name} did not become ready:\n{self.log()}")

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")[-6000:]

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not stop within {seconds} s:\n{self.log()}") from None
        finally:
            self._log.close()
            if self.process.stdout is not None:
                self.process.stdout.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def children(self, command: str) -> list[int]:
        """Return the pids of this program's descendants whose command line has `command` in it."""
        import psutil

        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end while we look; a zombie counts as ended
                if command in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    # ---- metrics --------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return every sample by its name, labels included as they are written."""
        url = f"http://127.0.0.1:{self.ready['metrics_port']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        return {name + (labels or ""): float(value) for name, labels, value in _SAMPLE.findall(text)}

    def worker_metric(self, name: str) -> float:
        """Return the sum of a worker metric's series; nan if there is none."""
        names = (f"tandem_worker_{name}", f"tandem_worker_{name}_total")
        found = [value for series, value in self.metrics().items() if series.partition("{")[0] in names]
        return sum(found) if found else float("nan")

    def pages(self, state: str) -> float:
        series = (value for name, value in self.metrics().items() if f'state="{state}"' in name)
        return next(series)

    def pages_in_use(self) -> float:
        return self.pages("held") + self.pages("quarantined")

    def wait_metric(self, condition: Callable[[Program], bool], seconds: float = 10.0) -> float:
        """Wait until the condition holds and return how long that took; fails after `seconds`."""
        began = time.monotonic()
        while not condition(self):
            assert time.monotonic() - began < seconds, f"{self.name}: {self.metrics()}\n{self.log()}"
            time.sleep(0.01)
        return time.monotonic() - began


def free_port() -> int:
    """Return a port for a program that is told which, outside of the range of those that others get for 0."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(20000, 30000))) as probe:
            return int(probe.getsockname()[1])


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    return grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)


def wait_serving(address: str, seconds: float = 20.0, credentials: grpc.ChannelCredentials | None = None) -> None:
    """Wait until the program's health service says SERVING."""
    deadline = time.monotonic() + seconds
    with open_channel(address, credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while (
            stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds).status
            != health_pb2.HealthCheckResponse.SERVING
        ):
            assert time.monotonic() < deadline, f"{address} is not serving"
            time.sleep(0.02)


class Service:
    """A gateway with its workers over one checkpoint. Everything it started ends with `close`."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.folder = folder
        self.credentials: grpc.ChannelCredentials | None = None  # of clients, for a gateway with TLS
        self.programs: list[Program] = []
        self.channels: list[grpc.Channel] = []

    def worker(self, role: str, *flags: str) -> Program:
        """Start a worker; call `wait_ready` on it."""
        program = Program(
            role,
            self.folder,
            *("--model.path", str(self.checkpoint)),
            *("--model.threads", "1"),
            *("--server.metrics-port", "0"),
            *("--server.drain-seconds", "5"),
            *("--cache.pool-bytes", str(48 << 20)),
            *(PATIENCE if role != "unified" else ()),
            *flags,
        )
        self.programs.append(program)
        return program

    def gateway(self, prefills: list[Program], decodes: list[Program], *flags: str) -> Program:
        program = Program(
            "gateway",
            self.folder,
            *("--model.path", str(self.checkpoint)),
            *("--server.drain-seconds", "5"),
            *("--gateway.prefill", ",".join(worker.address for worker in prefills)),
            *("--gateway.decode", ",".join(worker.address for worker in decodes)),
            *flags,
        )
        self.programs.append(program)
        program.wait_ready()
        wait_serving(program.address, credentials=self.credentials)
        self._wait_workers(program, len(prefills), len(decodes))
        return program

    def _wait_workers(self, gateway: Program, num_prefill: int, num_decode: int) -> None:
        """A gateway serves as soon as one decode worker is there; these tests want all of them."""
        stub = self.stub(gateway)
        deadline = time.monotonic() + 20.0
        while True:
            (model,) = stub.ListModels(pb.ListModelsRequest(), timeout=20).models
            if model.ready_prefill_workers == num_prefill and model.ready_decode_workers == num_decode:
                return
            assert time.monotonic() < deadline, f"{model}\n{gateway.log()}"
            time.sleep(0.02)

    def stub(self, gateway: Program) -> InferenceServiceStub:
        channel = open_channel(gateway.address, self.credentials)
        self.channels.append(channel)
        return InferenceServiceStub(channel)

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        for program in self.programs:
            if program.process.poll() is None:
                program.process.send_signal(signal.SIGCONT)
                program.kill()
            if not program._log.closed:
                program._log.close()
            if program.process.stdout is not None:
                program.process.stdout.close()

"""A real Prometheus over a real service: scrapes it as Kubernetes would have it scraped, and answers queries."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import yaml

from tandem.rpc.gen.inference.v1 import inference_service_pb2 as pb
from tests.e2e.oracle import greedy, random_prompt
from tests.e2e.service import Program, Service

PROMETHEUS = shutil.which("prometheus")
RULES = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "tandem" / "alerts" / "tandem.yaml"
START_SECONDS = 30.0
_ADDRESS = re.compile(r'msg="Listening on" address=(\S+)')


class Prometheus:
    """One server over `programs`, by pod name; with the alerts of the chart. Ends with `close`."""

    def __init__(self, folder: Path, programs: dict[str, Program], *, namespace: str = "demo") -> None:
        assert PROMETHEUS is not None
        folder.mkdir()
        self._config = folder / "prometheus.yaml"
        self._write(programs, namespace)
        self._log_path = folder / "prometheus.log"
        self._log = self._log_path.open("wb")
        self._process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={self._config}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._url = self._wait()
        except AssertionError:
            self.close()
            raise

    def _write(self, programs: dict[str, Program], namespace: str) -> None:
        """What the chart's PodMonitor comes to: a target a pod, with the labels that the operator adds."""
        targets = [
            {
                "targets": [f"127.0.0.1:{program.ready['metrics_port']}"],
                "labels": {"namespace": namespace, "pod": pod, "container": program.name, "job": f"{namespace}/tandem"},
            }
            for pod, program in programs.items()
        ]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [{"job_name": "tandem", "static_configs": targets}],
        }
        self._config.write_text(yaml.safe_dump(config))

    def _wait(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            log = self.log()
            address = _ADDRESS.search(log)
            if address is not None and "Server is ready" in log:
                return f"http://{address[1]}"
            assert self._process.poll() is None, log
            time.sleep(0.1)
        raise AssertionError(f"prometheus was not ready within {START_SECONDS} s:\n{self.log()}")

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the vector that an expression is now; fails if Prometheus refuses it."""
        data = self._get("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def has_data(self, expression: str) -> bool:
        """Whether an expression has a value that is a number."""
        return any(math.isfinite(float(sample["value"][1])) for sample in self.query(expression))

    def without_data(self, expressions: Iterable[str], *, seconds: float) -> list[str]:
        """Wait until all have data; return those that have none after so many seconds."""
        deadline = time.monotonic() + seconds
        missing = list(expressions)
        while True:
            missing = [expression for expression in missing if not self.has_data(expression)]
            if not missing or time.monotonic() >= deadline:
                return missing
            time.sleep(1.0)

    def query_range(self, expression: str, began: float, ended: float, step_seconds: float) -> list[dict[str, Any]]:
        """Return the series of an expression between two instants of Unix time."""
        data = self._get("query_range", query=expression, start=began, end=ended, step=step_seconds)
        result: list[dict[str, Any]] = data["result"]
        return result

    def _get(self, call: str, **parameters: object) -> dict[str, Any]:
        url = f"{self._url}/api/v1/{call}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        data: dict[str, Any] = answer["data"]
        return data

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Load:
    """Clients that keep asking until `stop`: most in earnest, some give up, some are late, some are wrong."""

    def __init__(
        self,
        service: Service,
        gateway: Program,
        *,
        num_clients: int = 3,
        max_prompt_tokens: int = 300,
        max_output_tokens: int = 48,
    ) -> None:
        self._max_prompt_tokens = max_prompt_tokens
        self._max_output_tokens = max_output_tokens
        self._stub = service.stub(gateway)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.codes: dict[str, int] = {}
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> dict[str, int]:
        """End every client; return how many calls ended with each status."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        return self.codes

    def _ask(self, seed: int) -> None:
        source = random.Random(seed)
        shared = random_prompt(random.Random(0), 160)
        count = 0
        while not self._stopping.is_set():
            count += 1
            length = source.randrange(20, self._max_prompt_tokens)
            prompt = (shared if count % 3 == 0 else []) + random_prompt(source, length)
            self._call(greedy(prompt, source.randrange(4, self._max_output_tokens)), count % 10)

    def _call(self, request: pb.GenerateRequest, kind: int) -> None:
        code = "OK"
        if kind == 7:
            request.sampling.temperature = -1.0
        try:
            call: Any = self._stub.StreamGenerate(request, timeout=0.01 if kind == 8 else 30.0)
            for number, _ in enumerate(call):
                if kind == 9 and number == 2:
                    call.cancel()
        except grpc.RpcError as error:
            code = error.code().name
        with self._lock:
            self.codes[code] = self.codes.get(code, 0) + 1

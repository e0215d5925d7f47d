"""`tandem up` and `tandem demo` for real, on this machine, with the built-in model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

SECONDS = 120.0
SMALL = ("--set", f"cache.pool_bytes={8 << 20}")


class Tandem:
    """A running `tandem ...`, its output in files."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tandem.cli.main", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + SECONDS
        while text not in (said := self.out.read_text()):
            assert time.monotonic() < deadline and self.process.poll() is None, said + self.err.read_text()
            time.sleep(0.05)
        return said

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def running(folder: Path, *words: str) -> Iterator[Tandem]:
    tandem = Tandem(folder, *words)
    try:
        yield tandem
    finally:
        if tandem.process.poll() is None:
            tandem.process.kill()
            tandem.process.wait()


def all_gone(processes: list[psutil.Process], seconds: float = 30.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def client(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_up_serves_until_interrupted(tmp_path: Path) -> None:
    with running(tmp_path, "up", "--port", "0", "--decode-loop", "normal", *SMALL) as tandem:
        said = tandem.wait_for("Ctrl-C stops everything")
        assert "overlap_prefill" in said and "normal_decode" in said and "KV transport: tcp" in said
        assert "no RDMA device" in said, "says why not another transport"
        address = re.search(r"gateway\s+(\S+)", said)
        assert address is not None
        where = ("--address", address[1])
        answer = client("generate", *where, "--temperature", "0", "--max-tokens", "8", "--stats", "import os\nimport ")
        assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
        assert "handed over" in answer.stderr and "TTFT" in answer.stderr
        again = client("chat", *where, "--temperature", "0", "--max-tokens", "8", "import os\nimport ")
        assert again.stdout == answer.stdout, "the demo model's chat template adds nothing"
        ids = client("generate", *where, "--token-ids", "5,6,7", "--max-tokens", "4", "--stats")
        assert ids.returncode == 0 and "3 prompt" in ids.stderr
        refused = client("generate", *where, "--token-ids", "99999")
        assert refused.returncode == 1 and "vocabulary" in refused.stderr and refused.stdout == ""
        processes = tandem.descendants()
        assert len(processes) == 7  # gateway; frontend, rank and transfer process twice
        tandem.process.send_signal(signal.SIGINT)
        assert tandem.process.wait(60.0) == 0
        assert all_gone(processes)


def test_up_ends_when_a_child_dies_and_says_which(tmp_path: Path) -> None:
    with running(tmp_path, "up", "--port", "0", "--unified", *SMALL) as tandem:
        said = tandem.wait_for("Ctrl-C stops everything")
        assert "KV transport: none" in said
        processes = tandem.descendants()
        (rank,) = [process for process in processes if "tandem.worker.rank_main" in process.cmdline()]
        rank.kill()
        assert tandem.process.wait(60.0) == 1
        error = tandem.err.read_text()
        assert "unified-0 ended with code 1" in error and "rank 0 ended by signal 9" in error
        assert all_gone(processes)


def test_up_starts_copies_of_the_model_and_checks_sizes(tmp_path: Path) -> None:
    with running(tmp_path, "up", "--port", "0", "--unified", "--data-size", "2", *SMALL) as tandem:
        said = tandem.wait_for("Ctrl-C stops everything")
        assert re.search(r"unified x2 +127\.0\.0\.1:\d+ +overlap +3264 +1632", said), said
        assert len([each for each in tandem.descendants() if "tandem.worker.rank_main" in each.cmdline()]) == 2
        tandem.process.send_signal(signal.SIGINT)
        assert tandem.process.wait(60.0) == 0
    refused = client("up", "--tensor-size", "many", "--data-size", "0")
    assert refused.returncode == 2
    assert "parallel.tensor_size=many" in refused.stderr and "parallel.data_size=0" in refused.stderr


def test_nothing_outlives_a_killed_up(tmp_path: Path) -> None:
    with running(tmp_path, "up", "--port", "0", "--unified", *SMALL) as tandem:
        tandem.wait_for("Ctrl-C stops everything")
        processes = tandem.descendants()
        tandem.process.kill()
        assert all_gone(processes)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--transport", "mooncake-rdma"], "trusted_network"),
    ],
)
def test_up_says_why_it_cannot_start(tmp_path: Path, words: list[str], expected: str) -> None:
    with running(tmp_path, "up", "--port", "0", *SMALL, *words) as tandem:
        assert tandem.process.wait(SECONDS) == 2
        error = tandem.err.read_text()
        assert "ended with code 2" in error and expected in error
        assert tandem.out.read_text() == ""


def test_demo(tmp_path: Path) -> None:
    with running(tmp_path, "demo", "--max-tokens", "16") as tandem:
        assert tandem.process.wait(SECONDS) == 0, tandem.err.read_text()
        said = tandem.out.read_text()
        for fact in (
            "16 answer",
            "TTFT",
            "TPOT",
            "MB handed over",
            "MB/s",
            "over tcp",
            "overlap_prefill, overlap_decode",
        ):
            assert fact in said, fact
        assert "Traceback" not in tandem.err.read_text()

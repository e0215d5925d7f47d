"""Ranks of one worker in two network namespaces: they find each other by address, and end together."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.oracle import Oracle, greedy, random_prompt
from tests.e2e.service import Service

SOON = 12.0  # what waits for a drain takes 60
PORT = 29611


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass(frozen=True)
class Namespace:
    """A second network namespace; `here` is this one's address towards it."""

    name: str
    here: str


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    number = os.getpid() % 200 + 20
    name, inner, outer = f"tdranks{number}", f"tdr{number}i", f"tdr{number}o"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        ip("link", "set", inner, "netns", name)
        ip("addr", "add", f"10.213.{number}.1/24", "dev", outer)
        ip("link", "set", outer, "up")
        for words in (["addr", "add", f"10.213.{number}.2/24", "dev", inner], ["link", "set", inner, "up"]):
            ip("netns", "exec", name, "ip", *words)
        ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
        yield Namespace(name, f"10.213.{number}.1")
    finally:
        subprocess.run(["ip", "link", "del", outer], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def follower_of(service: Service, namespace: Namespace, role: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Rank 1 of a worker, started by hand in the other namespace."""
    command = ["ip", "netns", "exec", namespace.name, sys.executable, "-m", "tandem.cli.main", role]
    command += ["--model.path", str(service.checkpoint), "--model.threads", "1", "--parallel.rank", "1", *flags]
    with (service.folder / "follower.log").open("wb") as log:
        follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield follower
        finally:
            follower.kill()
            follower.wait()
            assert follower.stdout is not None
            follower.stdout.close()


@pytest.mark.slow
def test_a_stage_in_another_network_namespace(service: Service, oracle: Oracle, namespace: Namespace) -> None:
    """It computes its layers, and pulls their KV itself from the prefill worker; when it goes, its worker goes."""
    token = service.folder / "token"
    token.write_text("a secret of the ranks of one worker")
    address = f"{namespace.here}:{PORT}"
    common = ["--parallel.rendezvous", address, "--parallel.token-file", str(token)]
    common += ["--parallel.trusted-network", "true", "--server.drain-seconds", "60"]
    prefill = service.worker("prefill", "--transfer.host", namespace.here, "--scheduler.budget-tokens", "64")
    decode = service.worker("decode", *common, "--parallel.pipeline-size", "2", "--parallel.remote-ranks", "1")
    with follower_of(service, namespace, "decode", *common) as follower:
        decode.wait_ready()
        assert not decode.children("tandem.worker.follower_main"), "rank 1 is elsewhere"
        assert follower.stdout is not None and '"first_layer": 2' in follower.stdout.readline()
        stub = service.stub(service.gateway([prefill.wait_ready()], [decode]))
        for length in (1, 150):
            prompt = random_prompt(random.Random(length), length)
            answer = stub.Generate(greedy(prompt, 24), timeout=60)
            oracle.check(prompt, list(answer.choices[0].token_ids), 24)
        assert decode.worker_metric("local_prefills") == 0
        follower.kill()
        began = time.monotonic()
        assert decode.process.wait(25.0) == 1
        assert time.monotonic() - began < SOON
        assert "rank 1 at 10.213." in decode.log() and "its connection ended" in decode.log()


def test_what_ranks_elsewhere_need_is_said_at_once(tmp_path: Path) -> None:
    words = ["unified", "--parallel.remote-ranks", "2", "--parallel.pipeline-size", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "tandem.cli.main", *words], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == 2
    for key in ("remote_ranks: 2 of 2", "rendezvous", "token_file", "trusted_network"):
        assert f"parallel.{key}" in result.stderr

"""How bench/compare.py talks to an engine's process: one JSON line a command on stdin, one a reply on a pipe.

Standard library only: an engine may live in a virtual environment that has nothing of Tandem's.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

_SECONDS_PER_COMMAND = 900.0


@dataclass(frozen=True)
class Setup:
    """What every engine is told alike. `options` are one engine's own."""

    model: str
    threads: int
    prompt_tokens: int
    prefill_batches: tuple[int, ...]
    context: int
    decode_batches: tuple[int, ...]
    steps: int
    vocab_size: int
    options: dict[str, Any]


class EngineUnderTest(Protocol):
    """What an engine's process implements. Seconds are of the engine alone, tokens are greedy."""

    version: str

    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        """Compute the prompts and return how long it took to have all first tokens, and these."""
        ...

    def decode(self, batch: int) -> list[float]:
        """Step `batch` requests from `context` tokens on, `steps` times, and return the seconds of each step."""
        ...


def prompts_of(setup: Setup, trial: int, batch: int) -> list[list[int]]:
    """The prompts of one trial: equal for all engines, new for every trial, so that no prefix cache helps."""
    generator = random.Random(f"{trial}/{batch}")
    return [[generator.randrange(setup.vocab_size) for _ in range(setup.prompt_tokens)] for _ in range(batch)]


def serve(make: Callable[[Setup], EngineUnderTest]) -> None:
    """Answer commands until stdin ends. For an engine's process: its arguments are a descriptor and the setup."""
    replies = os.fdopen(int(sys.argv[1]), "w")
    values = json.loads(sys.argv[2])
    for name in ("prefill_batches", "decode_batches"):
        values[name] = tuple(values[name])
    setup = Setup(**values)

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    began = time.monotonic()
    engine = make(setup)
    reply(version=engine.version, start_seconds=time.monotonic() - began)
    for line in sys.stdin:
        command = json.loads(line)
        if command["kind"] == "prefill":
            seconds, tokens = engine.prefill(prompts_of(setup, command["trial"], command["batch"]))
            reply(seconds=seconds, tokens=tokens)
        elif command["kind"] == "decode":
            reply(seconds=engine.decode(command["batch"]))
        elif command["kind"] == "memory":
            reply(peak_bytes=_status_bytes("VmHWM"))
        else:
            reply(**getattr(engine, command["kind"])())  # what only one engine can answer
    replies.close()


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


class EngineProcess:
    """The other side: one engine's process. Raises EngineGone when it ends or does not answer."""

    def __init__(self, name: str, python: str, script: str, setup: Setup, log: Path) -> None:
        self.name = name
        self.log = log
        reader, writer = os.pipe()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(setup.threads),
            "MKL_NUM_THREADS": str(setup.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # a slower kernel than this processor's own
            environment.pop(variable, None)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).parent / script), str(writer), json.dumps(asdict(setup))],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                env=environment,
            )
        os.close(writer)
        self._replies = os.fdopen(reader, "rb", buffering=0)
        self._unread = b""
        self.started = self._read()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineGone(self._last_words()) from error
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS_PER_COMMAND
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
            part = self._replies.read(1 << 16) if ready else b""
            if not part:
                self._process.kill()
                self._process.wait()
                raise EngineGone(self._last_words())
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self.name} ended or did not answer: " + " | ".join(lines[-3:])


class EngineGone(Exception):
    """An engine's process is of no use any more; the message has its last lines."""

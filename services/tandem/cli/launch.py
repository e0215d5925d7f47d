"""Starts programs of ours as child processes and knows how each is doing: for `tandem up` and `tandem demo`.

A child's ready line comes on its stdout, its log as JSON lines on its stderr. Children live in sessions of their own,
so a terminal's Ctrl-C reaches only the parent, and they end when the parent does, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tandem.cli.programs import PARENT_VARIABLE
from tandem.config_load import Program

KILL_SECONDS = 10.0  # a child that was told to end and has not by then is killed
_LINE_BYTES = 1 << 20
_TAIL_LINES = 15
_SHOWN_LEVELS = ("warning", "error", "critical")

Show = Callable[[str, str], None]  # name of the child, a line about it


class ChildDied(Exception):
    """A child ended that should not have; `exit_code` is what its parent ends with for that."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Child:
    """One program. `ready` is its ready line; both futures fail with ChildDied, or end with it, when it ends."""

    def __init__(self, name: str, show: Show, verbose: bool) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.ended: asyncio.Future[str] = loop.create_future()  # with why
        self._show = show
        self._verbose = verbose
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._last_error = ""
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, program: Program, flags: Sequence[str]) -> None:
        """Start the program with these flags."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tandem.cli.main",
            program,
            "--server.log-format",
            "json",
            *flags,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
        )
        self._task = asyncio.create_task(self._follow(self._process), name=self.name)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def tell(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self) -> None:
        """End it, orderly if it lets itself be ended so."""
        if self._task is None:
            return
        self._stopping = True
        self.tell(signal.SIGTERM)
        _, late = await asyncio.wait((self._task,), timeout=KILL_SECONDS)
        if late:
            self.tell(signal.SIGKILL)
            await asyncio.wait(late)

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None and process.stderr is not None
        await asyncio.gather(self._read_ready(process.stdout), self._read_log(process.stderr))
        code = await process.wait()
        why = self._last_error or "\n".join(self._tail)
        reason = f"{self.name} ended {f'by signal {-code}' if code < 0 else f'with code {code}'}"
        reason += f": {why}" if why else ""
        if not self.ready.done():
            self.ready.set_exception(ChildDied(reason, 2 if code == 2 else 1))
            self.ready.exception()  # whoever awaits gets it; nobody has to
        self.ended.set_result(reason)

    async def _read_ready(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict) and message.get("event") == "ready" and not self.ready.done():
                    self.ready.set_result(message)

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            try:
                record = json.loads(line)
                level, message = str(record["level"]), str(record["message"])
            except (ValueError, KeyError, TypeError):
                self._tail.append(line)
                if self._verbose:
                    self._show(self.name, line)
                continue
            if level in ("error", "critical"):
                self._last_error = message
            shown = level in _SHOWN_LEVELS and not self._stopping  # peers that go at the same time are no news
            if self._verbose or shown or record.get("progress"):
                self._show(self.name, message if level == "info" else f"{level}: {message}")


async def _lines(stream: asyncio.StreamReader) -> Any:
    """Yield decoded lines; one beyond the limit is skipped."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line.decode(errors="replace").rstrip()


async def all_ready(children: Sequence[Child]) -> list[dict[str, Any]]:
    """Wait for every ready line; raises ChildDied as soon as one of them has ended."""
    return await asyncio.gather(*(child.ready for child in children))


async def first_death(children: Sequence[Child]) -> str:
    """Wait until a child ends, and say which and why."""
    done, _ = await asyncio.wait([child.ended for child in children], return_when=asyncio.FIRST_COMPLETED)
    return done.pop().result()


async def stop_all(children: Sequence[Child]) -> None:
    """End the children, the last started first to be told, all at once."""
    await asyncio.gather(*(child.stop() for child in reversed(children)))
